"""The stream of everything that happens, for dashboards: server-sent events (WHATWG HTML, 9.2).

`Broadcaster` hands each event to all who subscribed. A reader that is too slow is let go, with a
last event that says so; it comes back with `Last-Event-ID` and is first given what the log has
since. FastAPI encodes the messages and sends the heartbeats (`fastapi.sse`).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import ServerSentEvent

MAX_WAITING = 1_000  # messages per reader
PIECE = 256  # events of the log between two turns of the event loop
OVERRUN = "overrun"


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Something that happened. Ids grow, and are those of the log."""

    event_id: int
    kind: str
    data: dict[str, Any]
    tenant: str | None
    ue: str | None

    def message(self) -> ServerSentEvent:
        """Return it as it is sent."""
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return ServerSentEvent(id=str(self.event_id), event=self.kind, raw_data=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a reader may and wants to see; None: all."""

    tenant: str | None = None
    ue: str | None = None
    kinds: frozenset[str] | None = None

    def admits(self, event: StreamEvent) -> bool:
        """Return whether the event passes."""
        return (
            (self.tenant is None or event.tenant == self.tenant)
            and (self.ue is None or event.ue == self.ue)
            and (self.kinds is None or event.kind in self.kinds)
        )


@dataclass(slots=True, eq=False)
class _Reader:
    wanted: Filter
    after_id: int  # it has everything up to here
    waiting: asyncio.Queue[ServerSentEvent | None] = field(default_factory=asyncio.Queue)
    overrun: bool = False


class Broadcaster:
    """Hands events to readers. All of it belongs to one event loop."""

    def __init__(
        self,
        replay: Callable[[int], Iterable[StreamEvent]],
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """`replay` returns what the log has after an id, oldest first.

        It has every event by the time that it is published.
        """
        self._replay = replay
        self._max_waiting = max_waiting
        self._readers: set[_Reader] = set()
        self._closed = False

    @property
    def readers(self) -> int:
        """How many are subscribed."""
        return len(self._readers)

    def publish(self, event: StreamEvent) -> None:
        """Hand an event to all readers that want it; never waits for one."""
        message = None
        for reader in tuple(self._readers):
            if event.event_id <= reader.after_id or not reader.wanted.admits(event):
                continue
            if reader.waiting.qsize() >= self._max_waiting:
                reader.overrun = True
                self._end(reader)
            else:
                message = message or event.message()
                reader.waiting.put_nowait(message)

    def close(self) -> None:
        """End every stream, after what already waits. A server that stops must call it first."""
        self._closed = True
        for reader in tuple(self._readers):
            self._end(reader)

    async def subscribe(
        self, wanted: Filter, last_event_id: int | None = None
    ) -> AsyncIterator[ServerSentEvent]:
        """Yield what happens from now on, or all that happened after `last_event_id`.

        Ends when the broadcaster closes, or with an OVERRUN event, which has no id: a client then
        reconnects with the id of the last event that it has.
        """
        reader = _Reader(wanted, -1)
        try:
            if last_event_id is not None:
                async for event in self._catch_up(last_event_id):
                    reader.after_id = event.event_id
                    if wanted.admits(event):
                        yield event.message()
            # Nothing was published between the end of the log and here: there was no await.
            if self._closed:
                return
            self._readers.add(reader)
            while (message := await reader.waiting.get()) is not None:
                yield message
            if reader.overrun:
                yield ServerSentEvent(event=OVERRUN, raw_data='{"resumeWith":"Last-Event-ID"}')
        finally:
            self._readers.discard(reader)

    async def _catch_up(self, last_id: int) -> AsyncIterator[StreamEvent]:
        """Yield what the log has after an id, until it has no more."""
        found = True
        while found and not self._closed:
            found = False
            for count, event in enumerate(self._replay(last_id), start=1):
                yield event
                found = True
                last_id = event.event_id
                if count % PIECE == 0:
                    await asyncio.sleep(0)  # the loop has others to serve
                    if self._closed:
                        return

    def _end(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        reader.waiting.put_nowait(None)
