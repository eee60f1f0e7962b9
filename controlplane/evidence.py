"""The evidence log (EVI), which is also the journal: append-only, hash-linked, durable.

One entry (`entries`) a line: canonical JSON (RFC 8785) with its index, the time (RFC 3339), the
event, the leaf hash of the entry before it (RFC 9162, section 2.1.1), and a digest: SHA-256 of the
entry without this member, so that the last one is as safe from damage as those that others link to.
All state is rebuilt from it. A last line that a crash cut short was never acknowledged and is
dropped; any other damage is refused and named.
"""

import errno
import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from controlplane.clock import Clock
from controlplane.entries import Chain, EntryError
from controlplane.lease import Event
from controlplane.merkle import Tree

CHUNK_BYTES = 65_536


class JournalError(Exception):
    """The journal cannot be used: damaged, in use, or not writable."""


class Journal:
    """An open journal; holds the file's lock."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open or create; `replay` must be exhausted before the first `append`."""
        self.path = path
        self._chain = Chain(clock)
        self._ends = array("Q", [0])  # where each entry begins in the file, and the last ends
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
        return self._chain.tree.size

    def root(self) -> bytes:
        """Return the Merkle root over all entries."""
        return self._chain.tree.root()

    @property
    def tree(self) -> Tree:
        """The Merkle tree over all entries; for reading."""
        return self._chain.tree

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the lines of entries `start` to before `end`, in pieces of at most CHUNK_BYTES.

        IndexError unless 0 <= start <= end <= size. Raises JournalError if it cannot be read.
        """
        if not 0 <= start <= end <= self.size:
            raise IndexError(f"not within these {self.size} entries")
        return self._read(self._ends[start], self._ends[end])

    def replay(self) -> Iterator[Event]:
        """Yield every event from the beginning; drop a last line that was cut short."""
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    if _is_json(line[:-1]):  # more than an entry: its end is damaged, not cut off
                        raise JournalError(f"{self._at_entry()}: is not ended by a new line")
                    os.ftruncate(self._file, self._ends[-1])
                    os.fdatasync(self._file)
                    return
                try:
                    entry = self._chain.check(line[:-1])
                except EntryError as error:
                    raise JournalError(f"{self._at_entry()}: {error}") from error
                self._ends.append(self._ends[-1] + len(line))
                yield entry.event

    def append(self, events: Sequence[Event]) -> None:
        """Write events and return when they are durable: one write, one sync."""
        lines = self._chain.lines(events)
        self._write(b"".join(line + b"\n" for line in lines))
        for line in lines:
            self._chain.add(line)
            self._ends.append(self._ends[-1] + len(line) + 1)

    def close(self) -> None:
        """Close the file and let go of its lock."""
        os.close(self._file)

    def _read(self, at: int, end: int) -> Iterator[bytes]:
        while at < end:
            try:
                chunk = os.pread(self._file, min(CHUNK_BYTES, end - at), at)
            except OSError as error:
                raise JournalError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not chunk:
                raise JournalError(f"{self.path}: has become shorter")
            yield chunk
            at += len(chunk)

    def _write(self, data: bytes) -> None:
        """Append all of `data` durably, or leave the file as it was."""
        if self._broken:
            raise JournalError(f"{self.path}: a write failed half-way; it takes no more")
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
            raise JournalError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _at_entry(self) -> str:
        return f"{self.path}: entry {self.size}"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
