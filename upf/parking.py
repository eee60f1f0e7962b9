"""Parking: packets that wait at the user plane until it is known where they may go.

A pair (a UE's address . a service's) waits because its first packets came without a lease, and the
control plane was paged for one, or because its lease is on hold. Pure: no I/O, and the time is an
argument. What a packet is the caller knows; here it is a token with a length.

Every packet stored is released, dropped, expired, or still held.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from controlplane.enforcement import Parked

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

Token = TypeVar("Token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkingLimits:
    """Bounds. Bytes are those of IP packets; the kernel's own memory for each is a few times that.

    A pair that waits for a page has few packets; one on hold, what a hold of its length may bring.
    """

    paged_packets_per_ue: int = 64
    held_packets_per_ue: int = 16_384
    bytes_per_ue: int = 16 << 20
    packets: int = 32_768  # of all UEs
    bytes: int = 64 << 20
    page_timeout_ms: int = 3_000
    pages_per_ue_s: float = 1.0
    page_burst: int = 5  # pages of a UE at once


class Arrival(Enum):
    """What is to be done with a packet that came."""

    STORED = auto()
    FIRST = auto()  # stored, and the control plane is to be paged
    NO_ROOM = auto()  # to be dropped, as what comes after it


@dataclass(slots=True)
class _Pair(Generic[Token]):
    deadline_ns: int
    on_hold: bool
    packets: deque[tuple[Token, int]] = field(default_factory=deque)


@dataclass(slots=True)
class _Ue:
    pages: float  # that it may still cause (token bucket)
    refilled_ns: int
    packets: int = 0
    bytes: int = 0


class Parking(Generic[Token]):
    """Who waits, with what, and until when. The first half of a pair's key is the UE's address."""

    def __init__(self, limits: ParkingLimits) -> None:
        self._limits = limits
        self._pairs: dict[bytes, _Pair[Token]] = {}
        self._ues: dict[bytes, _Ue] = {}
        self._packets = self._bytes = 0
        self._stored = self._released = self._dropped = self._expired = self._no_room = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._pairs

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def counts(self) -> Parked:
        """What became of all packets so far."""
        return Parked(
            stored=self._stored,
            released=self._released,
            dropped=self._dropped,
            expired=self._expired,
            held=self._packets,
            no_room=self._no_room,
        )

    @property
    def next_deadline_ns(self) -> int | None:
        """When the next pair has waited for too long."""
        return min((pair.deadline_ns for pair in self._pairs.values()), default=None)

    def arrive(self, key: bytes, token: Token, octets: int, now_ns: int) -> Arrival:
        """Take a packet, if there is room and its UE may cause a page where one is due."""
        limits, ue = self._limits, self._ue(key, now_ns)
        pair = self._pairs.get(key)
        of_ue = (
            limits.held_packets_per_ue
            if pair is not None and pair.on_hold
            else limits.paged_packets_per_ue
        )
        if (
            ue.packets >= of_ue
            or ue.bytes + octets > limits.bytes_per_ue
            or self._packets >= limits.packets
            or self._bytes + octets > limits.bytes
            or (pair is None and ue.pages < 1)
        ):
            self._no_room += 1
            return Arrival.NO_ROOM
        arrival = Arrival.STORED
        if pair is None:
            arrival = Arrival.FIRST
            ue.pages -= 1
            deadline_ns = now_ns + limits.page_timeout_ms * NS_PER_MS
            pair = self._pairs[key] = _Pair(deadline_ns, on_hold=False)
        pair.packets.append((token, octets))
        ue.packets += 1
        ue.bytes += octets
        self._packets += 1
        self._bytes += octets
        self._stored += 1
        return arrival

    def hold(self, key: bytes, until_ns: int) -> None:
        """Keep what comes for a pair, and what waits already, until then."""
        pair = self._pairs.get(key)
        if pair is None:
            self._pairs[key] = _Pair(until_ns, on_hold=True)
        else:
            pair.deadline_ns, pair.on_hold = until_ns, True

    def on_hold(self, key: bytes) -> bool:
        """Return whether a pair waits because its lease is on hold."""
        pair = self._pairs.get(key)
        return pair is not None and pair.on_hold

    def release(self, key: bytes) -> Iterator[Token]:
        """Yield what waits, in order of arrival, as it is let go; the pair itself stays."""
        pair = self._pairs.get(key)
        while pair is not None and pair.packets:
            token = self._pop(key, pair)
            self._released += 1
            yield token

    def end(self, key: bytes) -> None:
        """A pair whose packets were all released waits no more."""
        pair = self._pairs.get(key)
        if pair is not None and not pair.packets:
            del self._pairs[key]

    def passed(self) -> None:
        """A packet came that need not wait (any more)."""
        self._stored += 1
        self._released += 1

    def refuse(self, key: bytes) -> list[Token]:
        """Give up a pair; return what is to be refused."""
        tokens = self._give_up(key)
        self._dropped += len(tokens)
        return tokens

    def overdue(self, now_ns: int) -> list[tuple[bytes, bool]]:
        """Return which pairs have waited for too long, and whether each was on hold."""
        return [
            (key, pair.on_hold) for key, pair in self._pairs.items() if pair.deadline_ns <= now_ns
        ]

    def expire(self, key: bytes) -> list[Token]:
        """Give up a pair that nobody answered for; return what is to be dropped."""
        tokens = self._give_up(key)
        self._expired += len(tokens)
        return tokens

    def _give_up(self, key: bytes) -> list[Token]:
        pair = self._pairs.pop(key, None)
        tokens = []
        while pair is not None and pair.packets:
            tokens.append(self._pop(key, pair))
        return tokens

    def _pop(self, key: bytes, pair: _Pair[Token]) -> Token:
        token, octets = pair.packets.popleft()
        ue = self._ues[key[: len(key) // 2]]
        ue.packets -= 1
        ue.bytes -= octets
        self._packets -= 1
        self._bytes -= octets
        return token

    def _ue(self, key: bytes, now_ns: int) -> _Ue:
        address, limits = key[: len(key) // 2], self._limits
        ue = self._ues.get(address)
        if ue is None:
            ue = self._ues[address] = _Ue(limits.page_burst, now_ns)
        earned = (now_ns - ue.refilled_ns) * limits.pages_per_ue_s / NS_PER_S
        ue.pages = min(limits.page_burst, ue.pages + earned)
        ue.refilled_ns = now_ns
        return ue
