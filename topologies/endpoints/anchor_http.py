"""The HTTP server of an anchor: HTTP/1.1 and HTTP/2 with prior knowledge on one port, for ASGI.

It exists because of the drain: an anchor ends the connections of one session and no others, which
no ASGI server at hand lets an application do.
"""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import AsyncExitStack

from starlette.types import ASGIApp

from topologies.endpoints.anchor_drain import Drainer, Ends
from topologies.endpoints.anchor_http1 import Http1
from topologies.endpoints.anchor_http2 import PREFACE, Http2
from topologies.endpoints.anchor_link import Link

BACKLOG = 1024


class HttpServer:
    """Serves an application on sockets that listen already; `drainer` knows its connections."""

    def __init__(self, app: ASGIApp, drainer: Drainer) -> None:
        self._app = app
        self._drainer = drainer
        self._serving: set[asyncio.Task[None]] = set()

    async def serve(self, sockets: Iterable[socket.socket]) -> None:
        """Serve until cancelled."""
        async with AsyncExitStack() as stack:
            for listening in sockets:
                await stack.enter_async_context(
                    await asyncio.start_server(self._accepted, sock=listening, backlog=BACKLOG)
                )
            try:
                await asyncio.Event().wait()
            finally:
                for task in self._serving:
                    task.cancel()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        link = Link(reader, writer)
        connection = _Connection(self._app, link)
        self._drainer.opened(connection)
        try:
            await connection.run()
        except (OSError, TimeoutError):
            pass  # the client has left, or said nothing for long
        finally:
            self._drainer.closed(connection)
            self._serving.discard(task)
            link.close()


class _Connection:
    """A connection that shows with its first bytes which protocol it speaks."""

    def __init__(self, app: ASGIApp, link: Link) -> None:
        self._app = app
        self._link = link
        self._spoken: Http1 | Http2 | None = None
        self._patience_s: float | None = None  # it drains

    @property
    def ends(self) -> Ends:
        return self._link.ends

    def drain(self, patience_s: float) -> None:
        self._patience_s = patience_s
        if self._spoken is not None:
            self._spoken.drain(patience_s)

    def cut(self) -> None:
        if self._spoken is not None:
            self._spoken.cut()
        else:
            self._link.close()

    async def run(self) -> None:
        received = part = await self._link.read()
        while part and len(received) < len(PREFACE) and PREFACE.startswith(received):
            part = await self._link.read()
            received += part
        kind = Http2 if received.startswith(PREFACE) else Http1
        self._spoken = kind(self._app, self._link)
        if self._patience_s is not None:
            self._spoken.drain(self._patience_s)
        await self._spoken.run(received)
