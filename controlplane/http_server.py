"""Serves one ASGI application on several listeners, HTTP/1.1 and HTTP/2 (prior knowledge) on each.

Granian does HTTP; this module owns what surrounds it. Each listener has an instance of its own in
the event loop, and its requests carry its name in `scope["state"]["listener"]`: no header can
change by which way a request came, nor its source address. The lifespan runs once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from controlplane.listeners import BACKLOG, Listener, UnixListener, bound, listen, owned
from controlplane.silent_connections import SilentConnections

MAX_CONNECTIONS = 4096  # of one listener; more wait to be accepted
MAX_HEADER_BYTES = 32_768
MAX_STREAMS = 100  # requests at a time on one HTTP/2 connection
HEADER_TIMEOUT_MS = 5_000  # for the head of a request, and for an idle HTTP/1.1 connection
PING_INTERVAL_MS = 15_000  # on an HTTP/2 connection; one that does not answer is closed
PING_TIMEOUT_S = 5
SWEEP_INTERVAL_S = 5.0  # for connections on which nobody speaks
GRACE_S = 5.0  # for requests that are under way when the server stops

log = logging.getLogger(__name__)


class HttpServer:
    """Serves until `stop`, SIGTERM or SIGINT.

    Then no connection is accepted, streams end, other requests have `grace_s` to finish; what is
    left is answered with 503.
    """

    def __init__(
        self, app: Starlette, listeners: Sequence[Listener], *, grace_s: float = GRACE_S
    ) -> None:
        self._app = app
        self._listeners = tuple(listeners)
        self._grace_s = grace_s
        self._stopping = asyncio.Event()
        self._requests: set[_Request] = set()
        self.bound: tuple[Listener, ...] = ()  # while it serves: where, with the ports it was given

    def stop(self) -> None:
        """Begin to stop; `serve` returns when that is done."""
        self._stopping.set()

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called once all listeners accept.

        Raises ListenError if one cannot, and what the application's lifespan raises.
        """
        with contextlib.ExitStack() as stack:
            listening = []
            for listener in self._listeners:
                listening.append(stack.enter_context(listen(listener)))
                if isinstance(listener, UnixListener):
                    stack.enter_context(owned(listener.path))
            self.bound = tuple(map(bound, self._listeners, listening))
            stack.enter_context(_signals(self.stop))
            async with self._app.router.lifespan_context(self._app) as state:
                await self._serve(listening, dict(state or {}), ready)

    async def _serve(
        self,
        listening: Sequence[socket.socket],
        state: dict[str, Any],
        ready: Callable[[], None],
    ) -> None:
        servers = [
            _Server(self._entrance(listener, state), taken)
            for listener, taken in zip(self.bound, listening, strict=True)
        ]
        serving = [asyncio.create_task(server.serve()) for server in servers]
        stopping = asyncio.create_task(self._stopping.wait())
        sweeping = asyncio.create_task(self._sweep())
        started = asyncio.gather(*(server.started.wait() for server in servers))
        try:
            await asyncio.wait([started, *serving], return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                ready()
            await asyncio.wait([stopping, *serving], return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():
                for task in serving:
                    if task.done():
                        raise RuntimeError("the HTTP server ended by itself") from task.exception()
        finally:
            for waiting in (started, stopping, sweeping):
                waiting.cancel()
            for server in servers:
                server.stop()  # type: ignore[no-untyped-call]
            await self._finish(serving)

    async def _finish(self, serving: Sequence["asyncio.Task[None]"]) -> None:
        self._stopping.set()
        for request in self._requests:
            request.end_stream()
        _, late = await asyncio.wait(serving, timeout=self._grace_s)
        if late:
            for request in tuple(self._requests):
                request.cancel()
            # What still holds a server now is the unfinished head of a request.
            _, late = await asyncio.wait(late, timeout=HEADER_TIMEOUT_MS / 1000 + 1)
        if late:
            log.warning("%d listeners had connections that did not close", len(late))

    async def _sweep(self) -> None:
        ports = {listener.port for listener in self.bound if not isinstance(listener, UnixListener)}
        connections = SilentConnections(ports)
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            if closed := connections.sweep():
                log.warning("closed %d connections on which nobody spoke HTTP", closed)

    def _entrance(self, listener: Listener, state: dict[str, Any]) -> Callable[..., Any]:
        """Return the ASGI application of one listener."""
        unix = isinstance(listener, UnixListener)
        state = {**state, "listener": listener.name}

        async def entrance(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = state.copy()
            scope["client"] = None if unix else (scope["client"][0], int(scope["client"][1]))
            request = _Request(receive, send, self._stopping)
            self._requests.add(request)
            try:
                await self._app(scope, request.receive, request.send)
                await request.complete()
            except asyncio.CancelledError:
                if not self._stopping.is_set():
                    raise
                await request.abandon(scope)
            finally:
                self._requests.discard(request)

        return entrance


class _Request:
    """One request under way, with what it takes to end it early."""

    __slots__ = ("_body_received", "_ended", "_receive", "_send", "_state", "_stopping", "_task")

    def __init__(self, receive: Receive, send: Send, stopping: asyncio.Event) -> None:
        self._receive = receive
        self._send = send
        self._stopping = stopping
        self._task = asyncio.current_task()
        self._body_received = False
        self._state = "waiting"  # then "started", "streaming", "sent"
        self._ended: asyncio.Event | None = None

    async def receive(self) -> Message:
        """Pass on what the client sends. A stream is told that it left when the server stops."""
        if not self._body_received:
            message = await self._receive()
            self._body_received = not message.get("more_body", False)
            return message
        if self._ended is None:
            self._ended = asyncio.Event()
            if self._state == "streaming" and self._stopping.is_set():
                self._ended.set()
        client = asyncio.ensure_future(self._next())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait([client, ended], return_when=asyncio.FIRST_COMPLETED)
            return client.result() if client.done() else {"type": "http.disconnect"}
        finally:
            client.cancel()
            ended.cancel()

    async def _next(self) -> Message:
        return await self._receive()

    async def send(self, message: Message) -> None:
        """Pass on what the application sends."""
        if message["type"] == "http.response.start":
            self._state = "started"
        elif not message.get("more_body", False):
            self._state = "sent"
        elif self._state == "started":
            self._state = "streaming"
            if self._stopping.is_set():
                self.end_stream()
        await self._send(message)

    def end_stream(self) -> None:
        """Tell the application, if it streams, that its client has left."""
        if self._state == "streaming" and self._ended is not None:
            self._ended.set()

    async def complete(self) -> None:
        """Close a stream that the application left open because it was told to end it."""
        if self._state == "streaming" and self._stopping.is_set():
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def cancel(self) -> None:
        """Give the request up."""
        if self._task is not None:
            self._task.cancel()

    async def abandon(self, scope: Scope) -> None:
        """Answer a request that was given up."""
        if self._state == "waiting":
            problem = {"title": "Service Unavailable", "status": 503, "cause": "STOPPING"}
            response = JSONResponse(problem, 503, media_type="application/problem+json")
            await response(scope, self._receive, self._send)
        else:
            await self.complete()


class _Server(Server):
    """Granian on a socket that listens already."""

    def __init__(self, app: Callable[..., Any], listening: socket.socket) -> None:
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto,
            websockets=False,
            backlog=BACKLOG,
            backpressure=MAX_CONNECTIONS,
            http1_settings=HTTP1Settings(
                header_read_timeout=HEADER_TIMEOUT_MS, max_buffer_size=MAX_HEADER_BYTES
            ),
            http2_settings=HTTP2Settings(
                max_headers_size=MAX_HEADER_BYTES,
                max_concurrent_streams=MAX_STREAMS,
                keep_alive_interval=PING_INTERVAL_MS,
                keep_alive_timeout=PING_TIMEOUT_S,
            ),
            log_level=LogLevels.error,  # its warning is that embedding is experimental
            # Logs as the process does, instead of through handlers of its own.
            log_dictconfig={"incremental": True, "handlers": {}, "loggers": {}},
        )
        self._listening = listening
        self.started = asyncio.Event()

    def _init_shared_socket(self) -> None:
        # Its own sockets have SO_REUSEPORT and, in Unix, the mode that the umask leaves. It closes
        # what it is given.
        unix = self._listening.family == socket.AF_UNIX
        taken = SocketHolder(self._listening.detach(), unix, BACKLOG)  # type: ignore[call-arg]
        self._shd = taken  # type: ignore[assignment]

    def _spawn_workers(self, *args: Any) -> None:
        super()._spawn_workers(*args)  # type: ignore[no-untyped-call]
        # The worker is a task that was just made: after its first step, it accepts.
        asyncio.get_running_loop().call_soon(self.started.set)


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Stop at SIGTERM and SIGINT, which only the main thread can receive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
