"""HTTP/2 (RFC 9113) on one connection, by h2."""

import asyncio
from collections import deque
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame
from starlette.types import ASGIApp, Message

from topologies.endpoints.anchor_link import Headers, Link, head

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_STREAMS = 100
ANY_STREAM = (1 << 31) - 1
_PING = b"goaway\0\0"


class Http2:
    """One connection: many streams.

    While it drains, a GOAWAY tells the client to connect anew; streams under way run to their end.
    At a moment without streams one GOAWAY says all: what may be on its way has a higher number, and
    is made anew by the client. Where no such moment comes, section 6.8's two are sent: the first
    admits what is on its way, the second, a round trip later, names the last stream. Both leave
    streams alone, but clients built on h2 (httpx) give up theirs at any GOAWAY; hence the wait.
    """

    def __init__(self, app: ASGIApp, link: Link) -> None:
        self._app = app
        self._link = link
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self._streams: dict[int, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._window = asyncio.Event()  # it has grown
        self._draining = False
        self._last: int | None = None  # the highest stream that is served, once that was said
        self._insist: asyncio.TimerHandle | None = None

    def drain(self, patience_s: float) -> None:
        """Send GOAWAY when no stream is open; after `patience_s` also when some are."""
        if not self._draining:
            self._draining = True
            loop = asyncio.get_running_loop()
            self._insist = loop.call_later(patience_s, self._announce)
            self._say_last_if_idle()

    def cut(self) -> None:
        """Close; with a RST if streams are open."""
        if self._streams:
            self._link.reset()
        else:
            self._link.close()

    async def run(self, received: bytes) -> None:
        """Serve until one side has closed. OSError if the client did not."""
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS},
        )
        try:
            self._h2.initiate_connection()
            while received:
                for event in self._h2.receive_data(received):
                    self._take(event)
                    if isinstance(event, h2.events.ConnectionTerminated):
                        return
                self.flush()
                received = await self._read()
        except h2.exceptions.ProtocolError:
            self.flush()  # a GOAWAY that says why
        finally:
            if self._insist is not None:
                self._insist.cancel()
            for task in self._tasks:
                task.cancel()

    def flush(self) -> None:
        """Write what there is to be sent."""
        self._link.write(self._h2.data_to_send())

    async def _read(self) -> bytes:
        while True:
            try:
                return await self._link.read()
            except TimeoutError:
                if not self._streams:
                    return b""

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                # Beyond the last stream frames are passed over, as section 6.8 allows: of a RST
                # right behind the GOAWAY clients built on h2 make a protocol error.
                if self._last is None:
                    self._begin(event)
            case h2.events.DataReceived():
                stream = self._streams.get(event.stream_id)
                if stream is None:
                    self._h2.acknowledge_received_data(
                        event.flow_controlled_length, event.stream_id
                    )
                else:
                    stream.take(event.data, event.flow_controlled_length)
            case h2.events.StreamEnded():
                if stream := self._streams.get(event.stream_id):
                    stream.take(None, 0)
            case h2.events.StreamReset():
                if (stream := self._streams.get(event.stream_id)) and stream.task is not None:
                    stream.task.cancel()
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                self._window.set()
            case h2.events.PingAckReceived() if event.ping_data == _PING:
                self._say_last()

    # Streams

    def _begin(self, event: h2.events.RequestReceived) -> None:
        stream = self._streams[event.stream_id] = _Stream(self, self._h2, event.stream_id)
        stream.task = asyncio.create_task(self._serve(stream, event.headers))
        self._tasks.add(stream.task)
        stream.task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: "_Stream", headers: Any) -> None:
        pseudo = {bytes(name): bytes(value) for name, value in headers if name[:1] == b":"}
        others = [(bytes(name), bytes(value)) for name, value in headers if name[:1] != b":"]
        if b":authority" in pseudo:
            others.insert(0, (b"host", pseudo[b":authority"]))
        method, target = pseudo[b":method"].decode("ascii", "replace"), pseudo.get(b":path", b"*")
        scope = self._link.scope("2", method, target, others)
        try:
            await self._link.call(self._app, scope, stream.receive, stream.send)
        finally:
            del self._streams[stream.number]
            if not self._link.closing:
                stream.end()
                self._say_last_if_idle()
                self.flush()

    async def send_data(self, number: int, data: bytes, *, end: bool) -> None:
        """Send data on a stream, as the client's windows allow."""
        sent = 0
        while sent < len(data):
            room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._h2.send_data(number, data[sent : sent + room])
            sent += room
            self.flush()
            await self._link.written()
        if end:  # written by `_serve`, with the GOAWAY that may follow
            self._h2.end_stream(number)
            self._streams[number].ended = True
        else:
            self.flush()

    # Drain

    def _announce(self) -> None:
        """Take the first of section 6.8's two steps; the client answers the PING after it."""
        if self._last is None:
            self._goaway(ANY_STREAM)
            self._h2.ping(_PING)
            self.flush()

    def _say_last_if_idle(self) -> None:
        # Before the first request there is no last stream that a client could tell it from.
        if self._draining and not self._streams and self._h2.highest_inbound_stream_id:
            self._say_last()

    def _say_last(self) -> None:
        if self._last is None:
            self._last = self._h2.highest_inbound_stream_id
            self._goaway(self._last)

    def _goaway(self, last: int) -> None:
        # Not by h2's `close_connection`, after which h2 sends nothing on any stream.
        self.flush()
        frame = GoAwayFrame(0, last_stream_id=last, error_code=ErrorCodes.NO_ERROR)
        self._link.write(frame.serialize())


class _Stream:
    """One request and its answer."""

    def __init__(self, owner: Http2, connection: h2.connection.H2Connection, number: int) -> None:
        self.number = number
        self.task: asyncio.Task[None] | None = None
        self.ended = False  # from our side
        self._owner = owner
        self._h2 = connection
        self._body: deque[tuple[bytes | None, int]] = deque()
        self._came = asyncio.Event()
        self._whole = False  # the request has been read to its end
        self._head: tuple[int, Headers] | None = None  # not sent yet

    def take(self, data: bytes | None, flow_controlled: int) -> None:
        """Keep a part of the request's body; None: it is over."""
        self._body.append((data, flow_controlled))
        self._came.set()

    async def receive(self) -> Message:
        """ASGI."""
        if self._whole:
            return {"type": "http.disconnect"}
        while not self._body:
            self._came.clear()
            await self._came.wait()
        data = self._next_part()
        return {"type": "http.request", "body": data or b"", "more_body": data is not None}

    def _next_part(self) -> bytes | None:
        data, flow_controlled = self._body.popleft()
        self._whole = data is None
        if flow_controlled:
            self._h2.acknowledge_received_data(flow_controlled, self.number)
            self._owner.flush()
        return data

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self._head = head(message)
            return
        if self._head is not None:
            status, headers = self._head
            self._head = None
            self._h2.send_headers(self.number, [(b":status", b"%d" % status), *headers])
        body, more = message.get("body", b""), message.get("more_body", False)
        await self._owner.send_data(self.number, body, end=not more)

    def end(self) -> None:
        """Give back what the client sent in vain, and the stream if it is not over."""
        while self._body:
            self._next_part()
        try:
            if not self.ended:
                self._h2.reset_stream(self.number, ErrorCodes.INTERNAL_ERROR)
            elif not self._whole:  # section 8.1: the answer did not need the rest
                self._h2.reset_stream(self.number, ErrorCodes.NO_ERROR)
        except h2.exceptions.ProtocolError:
            pass  # the client has reset it already
