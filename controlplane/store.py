"""Where the control plane keeps what must survive it: entries, sinks, and undelivered notices.

`Store` is what the rest asks for; `sqlite_store` is the embedded default. One process at a time
owns a store.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class StoreError(Exception):
    """The store cannot be used: damaged, in use by another process, or not writable."""


@dataclass(frozen=True, slots=True)
class Sink:
    """Where notices about a session go. The credential is a secret: it is in no log or entry."""

    session_id: str
    uri: str
    credential: str | None = field(repr=False)  # JSON, as it was given


@dataclass(frozen=True, slots=True)
class Notice:
    """A notice to a sink, to be delivered at least once."""

    session_id: str
    body: bytes
    created_unix_ns: int
    is_last: bool = False  # once it is delivered the sink, and its credential, are forgotten


@dataclass(frozen=True, slots=True)
class Write:
    """What becomes durable together, or not at all."""

    lines: Sequence[bytes]  # entries, without line ends
    notices: Sequence[Notice] = ()
    sinks: Sequence[Sink] = ()


class Store(Protocol):
    """Durable state. Errors are StoreError."""

    def replay(self) -> Iterator[bytes]:
        """Yield every entry from the beginning."""

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield entries `start` to before `end`, in pieces of some entries, lines ended."""

    async def append(self, write: Write) -> None:
        """Return when all of it is durable. After StoreError none of it is.

        If that cannot be said either, every later call fails: only a new start can tell.
        """

    def with_sink(self) -> list[str]:
        """Return the sessions that have a sink."""

    def sink(self, session_id: str) -> Sink | None:
        """Return where notices about a session go."""

    def close(self) -> None:
        """Let go of the store."""
