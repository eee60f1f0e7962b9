"""Anchors are asked whether they are ready over real connections, and these are kept."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address

import pytest
from fakes import catalogue

from controlplane.catalogue import Catalogue
from controlplane.parties import AnchorRefusedError
from scripts import http_anchors
from scripts.http_anchors import HttpAnchors
from scripts.http_connection import MAX_BODY_BYTES, ConnectionEndedError, HttpConnection
from upf.config import AnchorPort

READY = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntrue"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ntrue\r\n0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 4\r\n\r\ntrue"
OLD = b"HTTP/1.0 200 OK\r\nserver: BaseHTTP/0.6\r\n\r\ntrue"  # ends with the connection
GARBAGE = b"SSH-2.0-anchor\r\n\r\n"
HALF = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntr"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(MAX_BODY_BYTES + 1)


class Anchor:
    """A server that says what the test gives it to say, one after the other."""

    def __init__(self, port: int, *says: bytes | None) -> None:
        self.port = port
        self.says = list(says)  # None: it closes the connection instead
        self.requests: list[bytes] = []
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        while self.says:
            try:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            says = self.says.pop(0)
            if says is None:
                break
            writer.write(says)
        writer.close()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.close()


def asked(*says: bytes | None, ask: Callable[[HttpAnchors, Anchor], Awaitable[None]]) -> Anchor:
    """Run `ask` with an anchor that says these."""

    async def run() -> Anchor:
        listening = socket.create_server(("127.0.0.1", 0))
        anchor = Anchor(listening.getsockname()[1], *says)
        server = await asyncio.start_server(anchor.serve, sock=listening)
        try:
            await ask(anchors_at(anchor.port), anchor)
        finally:
            anchor.hang_up()
            server.close()
        return anchor

    return asyncio.run(run())


def anchors_at(port: int) -> HttpAnchors:
    described = catalogue().model_dump()
    for service in described["services"]:
        service["port"] = port
    place = AnchorPort(
        name="edge1",
        interface="n6",
        address4=IPv4Address("127.0.0.1"),
        address6=IPv6Address("::1"),
    )
    return HttpAnchors(Catalogue.model_validate(described), (place,))


@pytest.mark.parametrize(
    ("says", "ready"),
    [
        *((READY, True), (CHUNKED, True), (LAST, True), (OLD, True)),
        *((BUSY, False), (GARBAGE, False), (HALF, False), (None, False), (ENDLESS, False)),
    ],
    ids=["ready", "chunked", "last", "old", "busy", "garbage", "half", "nothing", "endless"],
)
def test_what_an_anchor_says_is_what_it_is(says: bytes | None, ready: bool) -> None:
    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None:
        assert await anchors.ready("edge1", "chat") is ready

    anchor = asked(says, ask=ask)
    [request] = anchor.requests
    assert request.startswith(b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1:")


def test_a_connection_is_kept_and_one_that_was_closed_is_replaced() -> None:
    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None:
        for _ in range(3):
            assert await anchors.ready("edge1", "chat")
        assert anchor.connections == 1
        assert await anchors.ready("edge1", "chat")  # it hangs up instead, and is asked anew
        assert anchor.connections == 2
        anchor.hang_up()
        await asyncio.sleep(0.05)  # the other side sees it
        assert await anchors.ready("edge1", "chat")
        assert anchor.connections == 3

    anchor = asked(READY, READY, READY, None, READY, READY, READY, ask=ask)
    assert len(anchor.requests) == 6


def test_questions_at_the_same_time_have_connections_of_their_own() -> None:
    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None:
        for _ in range(2):
            said = await asyncio.gather(*(anchors.ready("edge1", "chat") for _ in range(3)))
            assert said == [True] * 3

    assert asked(*[READY] * 7, ask=ask).connections == 3


@pytest.mark.parametrize("says", [b"", HALF], ids=["nothing", "half an answer"])
def test_an_anchor_that_is_too_slow_is_not_ready(
    says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_anchors, "READY_TIMEOUT_S", 0.05)

    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None:
        assert not await anchors.ready("edge1", "chat")
        assert await anchors.ready("edge1", "chat")  # on another connection

    assert asked(says, READY, READY, ask=ask).connections == 2


def test_an_anchor_that_refuses_connections_is_told_from_a_slow_one() -> None:
    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None: ...

    port = asked(ask=ask).port

    async def refused() -> None:
        with pytest.raises(AnchorRefusedError, match="edge1 refuses connections"):
            await anchors_at(port).ready("edge1", "chat")

    asyncio.run(refused())


def test_an_answer_that_nobody_asked_for_closes_the_connection() -> None:
    async def ask(anchors: HttpAnchors, anchor: Anchor) -> None:
        connection = await HttpConnection.open("127.0.0.1", anchor.port)
        assert await connection.request(b"GET / HTTP/1.1\r\n\r\n") == (200, b"true")
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not connection.is_open:
                break
        with pytest.raises(ConnectionEndedError):
            await connection.request(b"GET / HTTP/1.1\r\n\r\n")

    asked(READY + READY, READY, ask=ask)
