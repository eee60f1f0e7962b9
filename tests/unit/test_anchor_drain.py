"""An anchor ends the connections of one session, and clients lose nothing by it."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from topologies.endpoints import anchor_drain
from topologies.endpoints.anchor_drain import Drainer
from topologies.endpoints.anchor_http import HttpServer

UE, OTHER, SERVICE = "127.0.0.2", "127.0.0.3", "127.0.0.1"
ANY_STREAM = (1 << 31) - 1


class Anchor:
    """A server on loopback whose streams end when they are told to."""

    def __init__(self) -> None:
        self.drainer = Drainer()
        self.peers: list[tuple[str, int]] = []  # of each request, its connection
        self.go_on = asyncio.Event()
        self.asked = 0
        self.came_back = False
        self.url = ""

    async def stream(self, request: Request) -> Response:
        self.peers.append((request.scope["client"][0], request.scope["client"][1]))

        async def parts() -> AsyncIterator[str]:
            yield "begun "
            await self.go_on.wait()
            yield "ended"

        return StreamingResponse(parts(), media_type="text/plain")

    async def echo(self, request: Request) -> Response:
        self.peers.append((request.scope["client"][0], request.scope["client"][1]))
        return PlainTextResponse(await request.body())

    async def ask(self) -> None:
        self.asked += 1
        if self.came_back:
            self.drainer.heed([{"sub": "ue1", "aud": "chat"}])

    def drain(self, for_s: float = 60, ue: str = UE) -> None:
        nbf = time.time() + for_s
        entry = {"sub": "ue1", "aud": "chat", "nbf": nbf, "flows": [[ue, SERVICE]]}
        self.drainer.heed([entry])

    def client(self, ue: str = UE, **options: Any) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(local_address=ue, **options)
        return httpx.AsyncClient(transport=transport, base_url=self.url, trust_env=False)

    @property
    def connections(self) -> int:
        return len(set(self.peers))


def with_anchor(body: Callable[[Anchor], Awaitable[None]]) -> None:
    async def main() -> None:
        anchor = Anchor()
        app = Starlette(
            routes=[Route("/stream", anchor.stream), Route("/", anchor.echo, methods=["POST"])]
        )
        listening = socket.create_server((SERVICE, 0))
        anchor.url = f"http://{SERVICE}:{listening.getsockname()[1]}"
        server = HttpServer(app, anchor.drainer)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(server.serve([listening])),
                tasks.create_task(anchor.drainer.run(anchor.ask)),
            ]
            try:
                async with asyncio.timeout(10):
                    await body(anchor)
            finally:
                for task in running:
                    task.cancel()

    asyncio.run(main())


HTTP1: dict[str, Any] = {"http1": True, "http2": False}
HTTP2: dict[str, Any] = {"http1": False, "http2": True}


@pytest.mark.parametrize("version", [HTTP1, HTTP2], ids=["http1", "http2"])
def test_a_client_whose_session_moved_connects_anew_and_loses_nothing(
    version: dict[str, Any],
) -> None:
    async def body(anchor: Anchor) -> None:
        anchor.go_on.set()
        async with anchor.client(**version) as ue, anchor.client(OTHER, **version) as other:
            for client in (ue, other):
                for content in (b"", b"x" * 300_000):
                    assert (await client.post("/", content=content)).content == content
            assert anchor.connections == 2
            anchor.go_on.clear()
            async with ue.stream("GET", "/stream") as streaming:
                received = streaming.aiter_text()
                assert await anext(received) == "begun "
                anchor.drain()
                anchor.go_on.set()
                assert [part async for part in received] == ["ended"]
            for _ in range(3):
                assert (await ue.post("/", content=b"hi")).text == "hi"
            assert (await other.post("/", content=b"hi")).text == "hi"
            ports = [port for address, port in anchor.peers if address == UE]
            # The stream that had begun is over: HTTP/2's GOAWAY goes out with its end, where no
            # HTTP/1.1 client expects anything; there the next answer says it.
            last = 3 if version is HTTP2 else 4
            assert len(set(ports[:last])) == 1
            assert len(set(ports[last - 1 :])) == len(ports[last - 1 :])
            assert len({port for address, port in anchor.peers if address == OTHER}) == 1

    with_anchor(body)


async def closed_by_peer(reader: asyncio.StreamReader) -> str:
    try:
        return "end" if await reader.read() == b"" else "more"
    except ConnectionResetError:
        return "reset"


class RawHttp2:
    """A client of RFC 9113 that does not give up its streams at a GOAWAY."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self.goaways: list[int] = []
        self.data: dict[int, bytes] = {}

    def ask(self, path: str) -> int:
        number = self._h2.get_next_available_stream_id()
        headers = {":method": "GET", ":path": path, ":scheme": "http", ":authority": "a"}
        self._h2.send_headers(number, list(headers.items()), end_stream=True)
        self._writer.write(self._h2.data_to_send())
        return number

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            if not (received := await self._reader.read(65_536)):
                raise EOFError
            while received:  # frame by frame: h2 is not to see a GOAWAY
                size = 9 + int.from_bytes(received[:3], "big")
                frame, received = received[:size], received[size:]
                if frame[3] == 7:
                    self.goaways.append(int.from_bytes(frame[9:13], "big"))
                    continue
                for event in self._h2.receive_data(frame):
                    if isinstance(event, h2.events.DataReceived):
                        self.data[event.stream_id] = (
                            self.data.get(event.stream_id, b"") + event.data
                        )
                self._writer.write(self._h2.data_to_send())


@contextlib.asynccontextmanager
async def connected(
    anchor: Anchor,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    port = httpx.URL(anchor.url).port
    reader, writer = await asyncio.open_connection(SERVICE, port, local_addr=(UE, 0))
    try:
        yield reader, writer
    finally:
        writer.close()


def test_a_connection_that_is_never_idle_gets_both_goaways_and_keeps_its_streams() -> None:
    async def body(anchor: Anchor) -> None:
        async with connected(anchor) as (reader, writer):
            client = RawHttp2(reader, writer)
            first = client.ask("/stream")
            await client.until(lambda: first in client.data)
            anchor.drain(for_s=anchor_drain.LEAD_S + 0.4)
            began = time.monotonic()
            await client.until(lambda: bool(client.goaways))
            assert 0.1 < time.monotonic() - began < 0.35  # half of what there is
            assert client.goaways == [ANY_STREAM]
            late = client.ask("/stream")  # on its way when the first GOAWAY came
            await client.until(lambda: len(client.goaways) == 2)
            assert client.goaways[1] in (first, late)
            anchor.go_on.set()
            await client.until(lambda: client.data[first] == b"begun ended")

    with_anchor(body)


def test_what_is_left_before_the_deadline_is_closed_so_that_the_client_sees_it() -> None:
    async def body(anchor: Anchor) -> None:
        async with connected(anchor) as busy, connected(anchor) as idle, connected(anchor) as new:
            for reader, writer in (busy, idle):
                path = "stream" if reader is busy[0] else "nothing"
                writer.write(f"GET /{path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                assert b" HTTP/1.1" not in await reader.readuntil(b"\r\n\r\n")
            await busy[0].readuntil(b"begun ")
            await idle[0].readexactly(9)  # its body: Not Found
            deadline = time.time() + anchor_drain.LEAD_S + 0.2
            anchor.drain(for_s=anchor_drain.LEAD_S + 0.2)
            ends = [closed_by_peer(reader) for reader, _ in (busy, idle, new)]
            assert await asyncio.gather(*ends) == ["reset", "end", "end"]
            assert deadline - anchor_drain.LEAD_S <= time.time() < deadline
            assert anchor.asked == 1

    with_anchor(body)


def test_a_session_that_has_come_back_keeps_its_connections() -> None:
    async def body(anchor: Anchor) -> None:
        anchor.came_back = True
        async with connected(anchor) as (reader, writer):
            writer.write(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n")
            await reader.readuntil(b"begun ")
            anchor.drain(for_s=anchor_drain.LEAD_S)
            while not anchor.asked:
                await asyncio.sleep(0.01)
            anchor.go_on.set()
            assert await reader.readuntil(b"ended")
            assert not reader.at_eof()

    with_anchor(body)
