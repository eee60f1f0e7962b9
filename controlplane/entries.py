"""What an entry of the evidence log looks like, and how one follows from the one before it.

An entry is a line of canonical JSON (RFC 8785). `Chain` is a log as far as it has been read or
written: it makes the next line, or checks it. No I/O: the log writes what comes from here, and an
auditor reads with it. How each kind of event is written is in `codec`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from controlplane.canonical import canonical, canonical_plain
from controlplane.clock import Clock, parse_rfc3339, rfc3339
from controlplane.codec import Codec, Record
from controlplane.merkle import Tree, leaf_hash

NO_ENTRY = bytes(32)
UTC_CLOCK = Clock(unix_offset_ns=0)  # with it, instants of events are Unix ns
_NO_DIGEST = "?" * 64  # holds its place while it is computed


class EntryError(Exception):
    """A line is not the entry that should be there; `index` is its own, if it is sound itself."""

    def __init__(self, why: str, index: int | None = None) -> None:
        self.index = index
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as read."""

    index: int
    at_ns: int  # when it was made durable, Unix ns
    event: Record  # its instants are on the clock it was read with


class Chain:
    """A log up to some entry: its Merkle tree, and what the next entry must link to."""

    def __init__(self, clock: Clock) -> None:
        """`clock` turns the log's UTC into the instants of events, and back."""
        self.tree = Tree()
        self._clock = clock
        self._codec = Codec(clock)
        self._previous: bytes | None = NO_ENTRY  # None: unknown
        self._next = 0

    def lines(self, events: Sequence[Record], now_ns: int | None = None) -> list[bytes]:
        """Return the entries of events that happen at `now_ns`; the chain does not change.

        `now_ns`: CLOCK_MONOTONIC; the present if not given.
        """
        at = rfc3339(self._clock.to_unix_ns(self._clock.now_ns() if now_ns is None else now_ns))
        previous = self._previous
        assert previous is not None
        lines = []
        for index, event in enumerate(events, start=self._next):
            members = self._codec.encode(event)
            members["at"] = at
            members["digest"] = _NO_DIGEST
            members["index"] = index
            members["previous"] = previous.hex()
            members["type"] = type(event).__name__
            line = canonical_plain(members)
            before, _, after = line.partition(_member(_NO_DIGEST))
            digest = hashlib.sha256(before + after).hexdigest()
            line = before + _member(digest) + after
            previous = leaf_hash(line)
            lines.append(line)
        return lines

    def add(self, line: bytes) -> None:
        """Take a line that `lines` made as the next."""
        self._previous = leaf_hash(line)
        self._next += 1
        self.tree.append(self._previous)

    def check(self, line: bytes) -> Entry:
        """Read a line and take it as the next. Raises EntryError, and has then not taken it."""
        try:
            members = orjson.loads(line)
            digest = members["digest"]
            before, _, after = line.partition(_member(digest))
            if digest != hashlib.sha256(before + after).hexdigest():
                raise EntryError("is not what its digest says")
            if line != canonical(members):
                raise EntryError("is not in canonical form")
            index = members["index"]
            if type(index) is not int:
                raise TypeError(f"{index!r} is no index")
            if index != self._next:
                raise EntryError(f"is numbered {index}", index)
            if self._previous is not None and members["previous"] != self._previous.hex():
                raise EntryError("is not linked to the entry before it", index)
            entry = Entry(index, parse_rfc3339(members["at"]), self._codec.decode(members))
        except KeyError as error:
            raise EntryError(f"is damaged (it lacks {error})") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise EntryError(f"is damaged ({error})") from error
        self.add(line)
        return entry

    def skip(self, line: bytes, index: int | None) -> None:
        """Take a line that `check` refused, to go on behind it; `index` is what the error said."""
        self.add(line)
        if index is None:
            self._previous = None
        else:
            self._next = index + 1


def entry_digest(members: dict[str, Any]) -> str:
    """Return the digest of an entry's other members."""
    return hashlib.sha256(canonical(members)).hexdigest()


def _member(digest: str) -> bytes:
    """Return the member as it is written; others follow it, since keys are sorted."""
    return b'"digest":"%s",' % digest.encode()
