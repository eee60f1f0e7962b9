"""The evidence log (EVI), which is also the journal: append-only, hash-linked, durable.

One entry (`entries`) per event: canonical JSON (RFC 8785) with its index, the time (RFC 3339), the
event, the leaf hash of the entry before it (RFC 9162, section 2.1.1), and a digest: SHA-256 of the
entry without this member, so that the last one is as safe from damage as those that others link to.
All state is rebuilt from it. Damage is refused, and the entry named.
"""

import json
from collections.abc import Iterator, Sequence

from controlplane.clock import Clock, parse_rfc3339
from controlplane.codec import Codec, Record
from controlplane.entries import UTC_CLOCK, Chain, Entry, EntryError
from controlplane.merkle import Tree
from controlplane.store import Notice, Sink, Store, StoreError, Write


class EvidenceLog:
    """The log in a store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """`replay` must be exhausted before the first `append`."""
        self.store = store
        self._chain = Chain(clock)

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
        """Yield the lines of entries `start` to before `end`, in pieces.

        IndexError unless 0 <= start <= end <= size. Raises StoreError if they cannot be read.
        """
        if not 0 <= start <= end <= self.size:
            raise IndexError(f"not within these {self.size} entries")
        return self.store.read(start, end)

    def replay(self) -> Iterator[Entry]:
        """Yield every entry from the beginning. Raises StoreError at the first damage."""
        for line in self.store.replay():
            try:
                yield self._chain.check(line)
            except EntryError as error:
                raise StoreError(f"evidence log: entry {self.size}: {error}") from error

    def entries(self, start: int) -> Iterator[Entry]:
        """Yield the entries from `start` on, decoded; their instants are Unix ns."""
        codec = Codec(UTC_CLOCK)
        for piece in self.read(min(start, self.size), self.size):
            for line in piece.splitlines():
                members = json.loads(line)
                at_ns = parse_rfc3339(members["at"])
                yield Entry(members["index"], at_ns, codec.decode(members))

    async def append(
        self,
        events: Sequence[Record],
        notices: Sequence[Notice] = (),
        sinks: Sequence[Sink] = (),
        now_ns: int | None = None,
    ) -> None:
        """Write events that happen at `now_ns`, and return when they are durable: one sync."""
        lines = self._chain.lines(events, now_ns)
        await self.store.append(Write(lines, notices, sinks))
        for line in lines:
            self._chain.add(line)
