"""Packets that wait at a user plane: its queue, who waits (`parking`), and the gate together.

Order: what waits is released before its flow goes past the queue again, so that nothing overtakes
it. A flow that gets a lease while packets wait is on hold for the time that takes.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from netfilterqueue import Packet

from controlplane.enforcement import (
    Binding,
    EnforcementError,
    Flow,
    Hold,
    Install,
    Move,
    Operation,
    Parked,
    Resume,
    Revoke,
)
from upf.flows import flow_key, flow_of
from upf.gate import Gate
from upf.nfqueue import NfQueue, release
from upf.parking import NS_PER_MS, NS_PER_S, Arrival, Parking, ParkingLimits

ROUNDS = 8  # of reading what came while the last was released
LET_GO_MS = 1_000  # longer than it takes to release what waits; ended at once when that is done
MANY = 8  # packets that waited: so many, and the flow goes on
GAP_MS = 2  # between its packets; waited for no longer
OVERFLOW_MS = 500  # the kernel drops so long for a UE that has had its share
LEAST_TIMER_S = 0.001

log = logging.getLogger(__name__)


class PacketBuffer:
    """Parks, releases and drops. Not thread-safe: the event loop of `start` owns it."""

    def __init__(
        self,
        gate: Gate,
        netns_path: str,
        number: int,
        limits: ParkingLimits | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Open the queue. Raises PacketQueueError."""
        limits = limits or ParkingLimits()
        self._gate = gate
        self._clock = clock
        self._parking: Parking[Packet] = Parking(limits)
        # The kernel's own bound is beyond ours, so that we find out who is beyond it.
        self._queue = NfQueue(netns_path, number, 2 * limits.packets, self._arrived)
        self._report: Callable[[Flow], None] = lambda flow: None
        self._turned_away: dict[bytes, int] = {}  # flow -> until when the kernel drops it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Follow the queue while the loop runs."""
        self._loop = loop
        self._loop.add_reader(self._queue.fileno(), self.read)

    def close(self) -> None:
        """Let go of the queue; what waits is dropped."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._queue.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self._queue.close()

    def report_to(self, report: Callable[[Flow], None]) -> None:
        """Call `report` for each flow that packets begin to wait for, without a lease."""
        self._report = report

    @property
    def counts(self) -> Parked:
        """What became of packets that waited."""
        return replace(self._parking.counts, lost_by_kernel=self._queue.lost())

    def read(self) -> None:
        """Take what has come."""
        self._queue.read()
        self._set_timer()

    def apply(self, operations: Sequence[Operation]) -> None:
        """Apply operations (Gate.apply), and let go what may go on after them."""
        self._queue.read()  # what came before a lease does not go after what comes with it
        if not self._parking and not any(isinstance(op, (Hold, Resume)) for op in operations):
            self._gate.apply(operations)
            return
        now_ns = self._clock()
        ready: list[Binding] = []
        revoked: set[bytes] = set()  # flows on hold whose lease goes
        changes: list[Operation] = []
        for operation in operations:
            match operation:
                case Install(binding) | Move(binding, _, _):
                    changes.append(operation)
                    if binding.anchor and any(key in self._parking for key in _keys(binding)):
                        changes.append(Hold(binding, now_ns + LET_GO_MS * NS_PER_MS))
                        ready.append(binding)
                case Resume(binding):
                    ready.append(binding)
                case Revoke(binding):
                    changes.append(operation)
                    revoked.update(key for key in _keys(binding) if self._parking.on_hold(key))
                case _:
                    changes.append(operation)
        self._gate.apply(changes)
        for operation in operations:
            if isinstance(operation, Hold):
                until_ns = min(operation.until_ns, operation.binding.expires_ns)
                for key in _keys(operation.binding):
                    self._parking.hold(key, until_ns)
        self._let_go(ready)
        for key in revoked.difference(*map(_keys, ready)):
            for packet in self._parking.refuse(key):
                packet.drop()
        self._set_timer()

    def refuse(self, flows: Iterable[Flow], backoff_ms: int) -> None:
        """Drop what waits for these flows; the kernel refuses what comes for a while."""
        keys = [flow_key(flow) for flow in flows]
        self._gate.turn_away("refused", keys, backoff_ms)
        self._queue.read()
        for key in keys:
            for packet in self._parking.refuse(key):
                release(packet)  # into the gate's refusal, which answers the sender

    def expire(self) -> None:
        """End the waits that have lasted too long: a page unanswered, or a hold."""
        for key, on_hold in self._parking.overdue(self._clock()):
            if on_hold or self._gate.passes(key):  # the kernel's own has ended; the lease steers
                self._release([key])
                self._parking.end(key)
                with contextlib.suppress(EnforcementError):  # then it goes the longer way
                    self._gate.end_holds([key])
            else:
                for packet in self._parking.expire(key):
                    packet.drop()

    def _let_go(self, bindings: list[Binding]) -> None:
        """Release what waits for leases, then end their holds."""
        if not bindings:
            return
        keys = [key for binding in bindings for key in _keys(binding)]
        now_ns = self._clock()
        for key in keys:  # whatever comes meanwhile waits behind
            self._parking.hold(key, now_ns + LET_GO_MS * NS_PER_MS)
        released = 0
        for _ in range(ROUNDS):
            self._queue.read()
            last = self._release(keys)
            released += last
            if not last:
                break
        try:
            if released > MANY:
                # Of a flow that goes on, the next packet is the furthest away when one has gone.
                if self._queue.wait(GAP_MS):
                    self._queue.read()
                    self._release(keys)
                self._gate.open_holds(keys)
                self._queue.read()
                self._release(keys)
            self._gate.end_holds(keys)
        except EnforcementError:
            return  # the holds end by themselves
        self._queue.read()
        self._release(keys)
        for key in keys:
            self._parking.end(key)

    def _release(self, keys: list[bytes]) -> int:
        released = 0
        for key in keys:
            for packet in self._parking.release(key):
                release(packet)
                released += 1
        return released

    def _arrived(self, packet: Packet, key: bytes, octets: int) -> None:
        if key not in self._parking and self._gate.passes(key):
            self._parking.passed()
            release(packet)
            return
        arrival = self._parking.arrive(key, packet, octets, self._clock())
        if arrival is Arrival.NO_ROOM:
            packet.drop()
            self._turn_away(key)
        elif arrival is Arrival.FIRST:
            self._report(flow_of(key))

    def _turn_away(self, key: bytes) -> None:
        """Let the kernel drop what comes of a flow: at once, or a flood would keep us reading."""
        now_ns = self._clock()
        if self._turned_away.get(key, 0) <= now_ns:
            self._turned_away[key] = now_ns + OVERFLOW_MS * NS_PER_MS
            try:
                self._gate.turn_away("overflow", [key], OVERFLOW_MS)
            except EnforcementError as error:
                log.error("%s", error)  # they are dropped here, at a greater cost

    def _set_timer(self) -> None:
        """See to it that the next wait which is too long ends."""
        next_ns = self._parking.next_deadline_ns
        if self._loop is None or next_ns is None:
            return
        if self._timer is not None and next_ns < self._timer_ns:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer_ns = next_ns
            delay_s = max((next_ns - self._clock()) / NS_PER_S, LEAST_TIMER_S)
            self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.expire()
        self._set_timer()


def _keys(binding: Binding) -> list[bytes]:
    return [flow_key(flow) for flow in binding.flows]
