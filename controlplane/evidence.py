"""The evidence log (EVI), which is also the journal: append-only, hash-linked, durable.

One entry a line: canonical JSON (RFC 8785) with its index, the time (RFC 3339), the event, the
leaf hash of the entry before it (RFC 9162, section 2.1.1), and a digest: SHA-256 of the entry
without this member, so that the last one is as safe from damage as those that others link to. All
state is rebuilt from it. A last line that a crash cut short was never acknowledged and is dropped;
any other damage is refused and named.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

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
from controlplane.merkle import Frontier, leaf_hash

NO_ENTRY = bytes(32)


class JournalError(Exception):
    """The journal cannot be used: damaged, in use, or not writable."""


class Journal:
    """An open journal; holds the file's lock."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open or create; `replay` must be exhausted before the first `append`."""
        self._clock = clock
        self._path = path
        self._frontier = Frontier()
        self._previous = NO_ENTRY
        self._broken = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise JournalError(f"{path}: another controller is using this journal") from None

    @property
    def size(self) -> int:
        """Number of entries."""
        return self._frontier.size

    def root(self) -> bytes:
        """Return the Merkle root over all entries."""
        return self._frontier.root()

    def replay(self) -> Iterator[Event]:
        """Yield every event from the beginning; drop a last line that was cut short."""
        with self._path.open("rb") as lines:
            good = 0
            for line in lines:
                if not line.endswith(b"\n"):
                    if _is_json(line[:-1]):  # more than an entry: its end is damaged, not cut off
                        raise JournalError(f"{self._at_entry()}: is not ended by a new line")
                    os.ftruncate(self._file, good)
                    os.fdatasync(self._file)
                    return
                yield self._check(line[:-1])
                good += len(line)

    def append(self, events: Sequence[Event]) -> None:
        """Write events and return when they are durable: one write, one sync."""
        at = rfc3339(self._clock.to_unix_ns(self._clock.now_ns()))
        previous = self._previous
        lines = []
        for index, event in enumerate(events, start=self._frontier.size):
            entry = {
                "index": index,
                "at": at,
                "previous": previous.hex(),
                "type": type(event).__name__,
                **self._encode(event),
            }
            line = rfc8785.dumps({**entry, "digest": _digest(entry)})
            previous = leaf_hash(line)
            lines.append(line)
        self._write(b"".join(line + b"\n" for line in lines))
        for line in lines:
            self._link(line)

    def close(self) -> None:
        """Close the file and let go of its lock."""
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        """Append all of `data` durably, or leave the file as it was."""
        if self._broken:
            raise JournalError(f"{self._path}: a write failed half-way; it takes no more")
        good = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(self._file)
        except OSError as error:
            self._broken = True
            with suppress(OSError):
                os.ftruncate(self._file, good)
                self._broken = False
            raise JournalError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _link(self, line: bytes) -> None:
        self._previous = leaf_hash(line)
        self._frontier.append(self._previous)

    def _check(self, line: bytes) -> Event:
        where = self._at_entry()
        try:
            entry = json.loads(line)
            if entry["digest"] != _digest({k: v for k, v in entry.items() if k != "digest"}):
                raise JournalError(f"{where}: is not what its digest says")
            if entry["index"] != self._frontier.size:
                raise JournalError(f"{where}: is numbered {entry['index']}")
            if entry["previous"] != self._previous.hex():
                raise JournalError(f"{where}: is not linked to the entry before it")
            event = self._decode(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{where}: is damaged ({error})") from error
        self._link(line)
        return event

    def _at_entry(self) -> str:
        return f"{self._path}: entry {self._frontier.size}"

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

    def _decode(self, entry: dict[str, Any]) -> Event:
        match entry["type"]:
            case "Prepared":
                terms = dict(entry["terms"])
                terms["flows"] = tuple(
                    Flow(ip_address(ue), ip_address(service)) for ue, service in terms["flows"]
                )
                terms["intent"] = Intent.model_validate(terms["intent"])
                return Prepared(Terms(**terms), self._until(entry))
            case "Committed":
                return Committed(entry["lease_id"], self._until(entry))
            case "Renewed":
                return Renewed(entry["lease_id"], self._until(entry))
            case "DrainStarted":
                return DrainStarted(entry["lease_id"], self._until(entry))
            case "Ended":
                return Ended(entry["lease_id"], EndReason(entry["reason"]))
            case unknown:
                raise ValueError(f"unknown type {unknown!r}")

    def _at(self, monotonic_ns: int) -> str:
        return rfc3339(self._clock.to_unix_ns(monotonic_ns))

    def _until(self, entry: dict[str, Any]) -> int:
        return self._clock.from_unix_ns(parse_rfc3339(entry["until"]))


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(rfc8785.dumps(entry)).hexdigest()


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
