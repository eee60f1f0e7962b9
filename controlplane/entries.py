"""What an entry of the evidence log looks like, and how one follows from the one before it.

An entry is a line of canonical JSON (RFC 8785). `Chain` is a log as far as it has been read or
written: it makes the next line, or checks it. No I/O: the journal writes what comes from here, and
an auditor reads with it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar

import rfc8785

from controlplane.clock import Clock, parse_rfc3339, rfc3339
from controlplane.enforcement import Flow
from controlplane.intent import Intent
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Event,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.merkle import Tree, leaf_hash

NO_ENTRY = bytes(32)
Kind = TypeVar("Kind")
UTC_CLOCK = Clock(unix_offset_ns=0)  # with it, instants of events are Unix ns


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
    event: Event  # its instants are on the clock it was read with


class Chain:
    """A log up to some entry: its Merkle tree, and what the next entry must link to."""

    def __init__(self, clock: Clock) -> None:
        """`clock` turns the log's UTC into the instants of events, and back."""
        self.tree = Tree()
        self._clock = clock
        self._previous: bytes | None = NO_ENTRY  # None: unknown
        self._next = 0

    def lines(self, events: Sequence[Event]) -> list[bytes]:
        """Return the entries of events that happen now; the chain does not change."""
        at = rfc3339(self._clock.to_unix_ns(self._clock.now_ns()))
        previous = self._previous
        assert previous is not None
        lines = []
        for index, event in enumerate(events, start=self._next):
            entry = {
                "index": index,
                "at": at,
                "previous": previous.hex(),
                "type": type(event).__name__,
                **self._encode(event),
            }
            line = rfc8785.dumps({**entry, "digest": entry_digest(entry)})
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
            members = json.loads(line)
            rest = rfc8785.dumps({k: v for k, v in members.items() if k != "digest"})
            if members["digest"] != hashlib.sha256(rest).hexdigest():
                raise EntryError("is not what its digest says")
            index = _of_type(int, members["index"])
            if index != self._next:
                raise EntryError(f"is numbered {index}", index)
            if self._previous is not None and members["previous"] != self._previous.hex():
                raise EntryError("is not linked to the entry before it", index)
            entry = Entry(self._next, parse_rfc3339(members["at"]), self._decode(members))
            behind_at = rest.index(b",") + 1  # where the digest has its place: members are sorted
            digest = b'"digest":"%s",' % members["digest"].encode()
            if line != rest[:behind_at] + digest + rest[behind_at:]:
                raise EntryError("is not in canonical form")
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

    def _encode(self, event: Event) -> dict[str, Any]:
        match event:
            case Prepared(terms, prepare_until_ns):
                members = {
                    "lease_id": terms.lease_id,
                    "session_id": terms.session_id,
                    "ue": terms.ue,
                    "aisi": terms.aisi,
                    "anchor": terms.anchor,
                    "flows": [[str(flow.ue), str(flow.service)] for flow in terms.flows],
                    "epoch": terms.epoch,
                    "intent": terms.intent.model_dump(mode="json", by_alias=True),
                }
                return {"terms": members, "until": self._at(prepare_until_ns)}
            case Committed(lease_id, until_ns) | Renewed(lease_id, until_ns):
                return {"lease_id": lease_id, "until": self._at(until_ns)}
            case DrainStarted(lease_id, until_ns):
                return {"lease_id": lease_id, "until": self._at(until_ns)}
            case Ended(lease_id, reason):
                return {"lease_id": lease_id, "reason": reason.value}

    def _decode(self, members: dict[str, Any]) -> Event:
        match members["type"]:
            case "Prepared":
                terms = dict(members["terms"])
                terms["flows"] = tuple(
                    Flow(ip_address(ue), ip_address(service)) for ue, service in terms["flows"]
                )
                terms["intent"] = Intent.model_validate(terms["intent"])
                for name in ("lease_id", "session_id", "ue", "aisi", "anchor"):
                    _of_type(str, terms[name])
                _of_type(int, terms["epoch"])
                return Prepared(Terms(**terms), self._until(members))
            case "Committed":
                return Committed(_of_type(str, members["lease_id"]), self._until(members))
            case "Renewed":
                return Renewed(_of_type(str, members["lease_id"]), self._until(members))
            case "DrainStarted":
                return DrainStarted(_of_type(str, members["lease_id"]), self._until(members))
            case "Ended":
                reason = EndReason(members["reason"])
                return Ended(_of_type(str, members["lease_id"]), reason)
            case unknown:
                raise ValueError(f"unknown type {unknown!r}")

    def _at(self, monotonic_ns: int) -> str:
        return rfc3339(self._clock.to_unix_ns(monotonic_ns))

    def _until(self, members: dict[str, Any]) -> int:
        return self._clock.from_unix_ns(parse_rfc3339(members["until"]))


def entry_digest(members: dict[str, Any]) -> str:
    """Return the digest of an entry's other members."""
    return hashlib.sha256(rfc8785.dumps(members)).hexdigest()


def _of_type(kind: type[Kind], value: object) -> Kind:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
