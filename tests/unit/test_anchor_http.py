"""The anchor's HTTP server bears what clients send, right or wrong."""

import asyncio

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_anchor_drain import HTTP1, HTTP2, Anchor, connected, with_anchor

REQUEST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi"


async def exchanged(anchor: Anchor, *sent: bytes) -> bytes:
    """Send parts, then the end; return what comes."""
    async with connected(anchor) as (reader, writer):
        for part in sent:
            writer.write(part)
            await asyncio.sleep(0.01)
        writer.write_eof()
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


def test_http1_pipelined_in_pieces_and_by_head() -> None:
    async def body(anchor: Anchor) -> None:
        assert (await exchanged(anchor, REQUEST + REQUEST)).count(b"\r\n\r\nhi") == 2
        assert (await exchanged(anchor, b"P", REQUEST[1:9], REQUEST[9:])).endswith(b"hi")
        expecting = REQUEST.replace(b"host", b"expect: 100-continue\r\nhost")
        assert b" 100 " in await exchanged(anchor, expecting[:-2], b"hi")
        head = await exchanged(anchor, b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert (head.count(b"HTTP/1.1 405"), head.endswith(b"\r\n\r\n")) == (1, True)
        closed = await exchanged(anchor, REQUEST.replace(b"1.1", b"1.0") + REQUEST)
        assert closed.count(b"HTTP/1.1 200") == 1

    with_anchor(body)


@pytest.mark.parametrize("wrong", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 99_999])
def test_what_is_no_request_is_refused(wrong: bytes) -> None:
    async def body(anchor: Anchor) -> None:
        assert (await exchanged(anchor, wrong))[:10] in (b"HTTP/1.1 4", b"")

    with_anchor(body)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]), st.binary(max_size=99))
def test_any_bytes_do_no_harm(preface: bytes, rest: bytes) -> None:
    async def body(anchor: Anchor) -> None:
        await exchanged(anchor, preface + rest)
        assert (await exchanged(anchor, REQUEST)).endswith(b"hi")

    with_anchor(body)


@pytest.mark.parametrize("version", [HTTP1, HTTP2], ids=["http1", "http2"])
def test_a_client_that_leaves_in_mid_stream_ends_it(version: dict[str, bool]) -> None:
    async def body(anchor: Anchor) -> None:
        async with anchor.client(**version) as client, client.stream("GET", "/stream") as answer:
            assert await anext(answer.aiter_text()) == "begun "
        async with anchor.client(**version) as client:
            many = [client.post("/", content=b"x" * 100_000) for _ in range(20)]
            assert all(len(answer.content) == 100_000 for answer in await asyncio.gather(*many))
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                (await client.get("/nowhere")).raise_for_status()

    with_anchor(body)
