"""The HTTP server: listeners, both protocols, limits, and how it stops."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from controlplane.body_limit import MAX_BODY_BYTES, BodyLimit
from controlplane.http_server import HttpServer
from controlplane.listeners import Listener, ListenError, TcpListener, UnixListener
from controlplane.silent_connections import SilentConnections

V4 = TcpListener("network", ip_address("127.0.0.1"), 0)
V6 = TcpListener("network", ip_address("::1"), 0)


@dataclass
class Seen:
    """What the application went through."""

    lifespan: list[str] = field(default_factory=list)
    streaming: asyncio.Event = field(default_factory=asyncio.Event)
    stream_ended: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


def application(seen: Seen) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, str]]:
        seen.lifespan.append("up")
        yield {"of": "lifespan"}
        seen.lifespan.append("down")

    async def who(request: Request) -> JSONResponse:
        return JSONResponse(
            {
                "listener": request.state.listener,
                "host": request.client.host if request.client else None,
                "of": request.state.of,
                "version": request.scope["http_version"],
            }
        )

    async def body(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    async def wait(_: Request) -> Response:
        seen.waiting.set()
        await seen.go_on.wait()
        return Response("finished")

    async def stream(_: Request) -> StreamingResponse:
        async def ticks() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick\n"
                    seen.streaming.set()
                    await asyncio.sleep(0.01)
            finally:
                seen.stream_ended.set()

        return StreamingResponse(ticks())

    app = Starlette(
        routes=[
            Route("/who", who),
            Route("/body", body, methods=["POST"]),
            Route("/wait", wait),
            Route("/stream", stream),
        ],
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit, timeout_s=0.3)
    return app


@contextlib.asynccontextmanager
async def serving(app: Starlette, *listeners: Listener, grace_s: float = 5.0) -> AsyncIterator[Any]:
    server = HttpServer(app, listeners, grace_s=grace_s)
    ready = asyncio.Event()
    task = asyncio.create_task(server.serve(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if task.done():
            await task  # raises
        yield server
    finally:
        server.stop()
        if not task.done():
            await task


def client(listener: Listener, http2: bool = False) -> httpx.AsyncClient:
    unix = str(listener.path) if isinstance(listener, UnixListener) else None
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=unix, http1=not http2, http2=http2),
        base_url="http://operator" if unix else f"http://{listener}",
        timeout=5,
    )


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


async def raw(listener: TcpListener, sent: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(str(listener.host), listener.port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def test_each_listener_speaks_both_protocols_and_says_which_way_a_request_came(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        seen = Seen()
        unix = UnixListener("operator", tmp_path / "s")
        forged = {"x-forwarded-for": "10.45.0.1", "forwarded": "for=10.45.0.1;by=operator"}
        async with serving(application(seen), unix, V4, V6) as server:
            for listener, host in zip(server.bound, (None, "127.0.0.1", "::1"), strict=True):
                for http2 in (False, True):
                    async with client(listener, http2) as http:
                        answer = await http.get("/who", headers=forged)
                    assert answer.json() == {
                        "listener": listener.name,
                        "host": host,
                        "of": "lifespan",
                        "version": "2" if http2 else "1.1",
                    }
            assert seen.lifespan == ["up"]
        assert seen.lifespan == ["up", "down"]
        assert not unix.path.exists()

    run(main)


def test_a_unix_socket_is_its_owners_alone_and_replaces_only_a_dead_one(tmp_path: Path) -> None:
    async def main() -> None:
        unix = UnixListener("operator", tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(unix.path))
        umask = os.umask(0)
        try:
            async with serving(application(Seen()), unix):
                assert unix.path.stat().st_mode & 0o777 == 0o600
                with pytest.raises(ListenError, match=rf"{unix.path}: Address already in use"):
                    async with serving(application(Seen()), unix):
                        pass
                async with client(unix) as http:  # the first one is still there
                    assert (await http.get("/who")).status_code == 200
        finally:
            os.umask(umask)
        unix.path.write_text("a file")
        with pytest.raises(ListenError, match="File exists"):
            async with serving(application(Seen()), unix):
                pass
        assert unix.path.read_text() == "a file"

    run(main)


def test_a_port_in_use_is_an_error_that_names_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        unix = UnixListener("operator", tmp_path / "s")
        seen = Seen()
        async with serving(application(Seen()), V4) as first:
            (taken,) = first.bound
            with pytest.raises(ListenError, match=f"{taken}: Address already in use"):
                async with serving(application(seen), unix, taken):
                    pass
        assert seen.lifespan == []
        assert not unix.path.exists()

    run(main)


def test_a_body_is_bounded_in_size_and_time() -> None:
    async def chunks(size_bytes: int) -> AsyncIterator[bytes]:
        for start in range(0, size_bytes, 1000):
            yield bytes(min(1000, size_bytes - start))

    async def main() -> None:
        async with serving(application(Seen()), V4) as server:
            (listener,) = server.bound
            for http2 in (False, True):
                async with client(listener, http2) as http:
                    for size_bytes, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
                        for content in (bytes(size_bytes), chunks(size_bytes)):
                            answer = await http.post("/body", content=content)
                            assert answer.status_code == status
                            if status == 200:
                                assert answer.json() == size_bytes
                            else:
                                assert answer.json()["cause"] == "TOO_LARGE"
                                assert answer.headers["content-type"] == "application/problem+json"
            head = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            assert (await raw(listener, head + b"slow")).startswith(b"HTTP/1.1 408 ")
            broken = b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
            assert (await raw(listener, broken)).startswith(b"HTTP/1.1 400 ")

    run(main)


def test_malformed_http_is_refused_without_a_5xx() -> None:
    def get(target: bytes = b"/who", headers: bytes = b"", version: bytes = b"1.1") -> bytes:
        return b"GET %s HTTP/%s\r\nHost: x\r\nConnection: close\r\n%s\r\n" % (
            target,
            version,
            headers,
        )

    async def main() -> None:
        async with serving(application(Seen()), V4) as server:
            (listener,) = server.bound
            for sent, statuses in (
                (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n", {b"400"}),
                (b"G@T / HTTP/1.1\r\n\r\n", {b"400"}),
                (get(version=b"9.9"), {b"400"}),
                (get(b"/\x00"), {b"400"}),
                (get(b"/%ff%zz"), {b"400", b"404"}),
                (get("/ü".encode()), {b"400", b"404"}),
                (get(headers=b"Content-Length: 3\r\nContent-Length: 4\r\n"), {b"400"}),
                (get(headers=b"Content-Length: -1\r\n"), {b"400"}),
                (get(headers=b"No colon\r\n"), {b"400"}),
                (get(headers=b"X: " + bytes([0xFF, 0xFE]) + b"\r\n"), {b"200", b"400"}),
                (get(headers=b"X: " + b"a" * 100_000 + b"\r\n"), {b"431", b""}),
                (get(headers=b"X: a\r\n" * 5_000), {b"431", b""}),
                (get(b"/" + b"a" * 100_000), {b"414", b"431", b""}),
                (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", {b"", b"404"}),
                (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100, {b""}),
            ):
                answer = await raw(listener, sent)
                status = answer[9:12] if answer.startswith(b"HTTP/1") else b""
                assert status in statuses, (sent[:40], answer[:80])
            async with client(listener) as http:
                assert (await http.get("/who")).status_code == 200

    run(main)


def test_a_stream_ends_when_its_client_leaves() -> None:
    async def main() -> None:
        for http2 in (False, True):
            seen = Seen()
            async with serving(application(seen), V4) as server:
                async with (
                    client(server.bound[0], http2) as http,
                    http.stream("GET", "/stream") as answer,
                ):
                    assert await anext(answer.aiter_lines()) == "tick"
                await asyncio.wait_for(seen.stream_ended.wait(), 5)

    run(main)


def test_a_stop_finishes_requests_and_ends_streams() -> None:
    # HTTP/1.1 only: h2 as a client takes GOAWAY for the end of the connection (RFC 9113, 6.8).
    async def main() -> None:
        seen = Seen()
        async with (
            serving(application(seen), V4) as server,
            client(server.bound[0]) as http,
        ):
            request = asyncio.create_task(http.get("/wait"))
            stream = asyncio.create_task(http.get("/stream"))
            await seen.waiting.wait()
            await seen.streaming.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await stream).text.startswith("tick\n")  # whole: its end was sent
            assert seen.stream_ended.is_set()
            assert not request.done()
            with pytest.raises(httpx.ConnectError):
                async with client(server.bound[0]) as late:
                    await late.get("/who")
            seen.go_on.set()
            assert (await request).text == "finished"
        assert seen.lifespan == ["up", "down"]

    run(main)


def test_a_stop_is_bounded() -> None:
    async def main() -> None:
        seen = Seen()
        async with serving(application(seen), V4, grace_s=0.2) as server:
            (listener,) = server.bound
            async with client(listener) as http:
                request = asyncio.create_task(http.get("/wait"))
                await seen.waiting.wait()
                started = time.monotonic()
                server.stop()
                answer = await request
                assert (answer.status_code, answer.json()["cause"]) == (503, "STOPPING")
        assert 0.2 <= time.monotonic() - started < 2

    run(main)


def test_connections_on_which_nobody_speaks_are_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        address = listening.getsockname()
        sweeper = SilentConnections({address[1]})

        def connect(sent: bytes) -> socket.socket:
            near = stack.enter_context(socket.create_connection(address))
            near.sendall(sent)
            stack.enter_context(listening.accept()[0])
            near.settimeout(0.05)
            return near

        silent, partial = connect(b""), connect(b"PRI * HT")
        speaking = connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sweeper.sweep() == 0
        new = connect(b"")
        assert sweeper.sweep() == 2
        assert silent.recv(1) == partial.recv(1) == b""
        for alive in (speaking, new):
            with pytest.raises(TimeoutError):
                alive.recv(1)
