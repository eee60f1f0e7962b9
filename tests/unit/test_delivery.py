"""Delivery to real HTTP receivers on loopback: in order, again when it fails, never for ever."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

import pytest
from receivers import (
    QUICK,
    MemoryOutbox,
    dispatching,
    receiving,
    run,
)
from starlette.requests import Request
from starlette.responses import Response

from controlplane import delivery
from controlplane.sink_http import MAX_ANSWER_BYTES


def test_each_sink_gets_its_notices_in_order_one_at_a_time() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            ids: dict[str, list[int]] = defaultdict(list)
            for _ in range(10):
                for path in ("/a", "/b", "/c"):
                    ids[path].append(outbox.add(receiver.root + path))
            receiver.answers("/b", 503, 204, 503, 500, 204, 429)
            async with dispatching(outbox) as dispatcher:
                await outbox.until(lambda: len(outbox.finished) == 30)
            assert receiver.got["/a"] == ids["/a"]
            assert receiver.got["/c"] == ids["/c"]
            assert list(dict.fromkeys(receiver.got["/b"])) == ids["/b"]
            assert len(receiver.got["/b"]) == 10 + 4
            assert sorted(outbox.finished) == list(range(1, 31))
            assert receiver.most_at_once == 1
            assert (dispatcher.counts.delivered, dispatcher.counts.retried) == (30, 4)

    run(scenario())


def test_a_sink_that_never_answers_delays_no_other() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            for_ever = asyncio.Event()

            async def hang(request: Request, body: bytes) -> Response:
                await for_ever.wait()
                return Response()

            receiver.handlers["/dead"] = hang
            dead = [outbox.add(receiver.root + "/dead") for _ in range(100)]
            async with dispatching(outbox, timeout_s=60, concurrency=2) as dispatcher:
                while not receiver.under_way["/dead"]:
                    await asyncio.sleep(0.001)
                alive = [outbox.add(receiver.root + path) for path in ("/a", "/b") * 20]
                dispatcher.wake()
                await outbox.until(lambda: len(outbox.finished) == len(alive))
                assert sorted(outbox.finished) == alive
                assert receiver.got["/dead"] == dead[:1]
            for_ever.set()

    run(scenario())


def test_an_attempt_takes_only_so_long_however_slowly_the_answer_drips() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n")
            with suppress(ConnectionError):
                while True:
                    writer.write(b"x: y\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)

        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        number = outbox.add(f"http://127.0.0.1:{port}/")
        async with dispatching(outbox, timeout_s=0.05):
            await outbox.until(lambda: outbox.waiting[number].attempts >= 2)
        server.close()

    run(scenario())


def test_an_answer_without_end_is_read_only_so_far() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        sent_bytes = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent_bytes
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            with suppress(ConnectionError):
                while True:
                    writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                    sent_bytes += 4096
                    await writer.drain()

        server = await asyncio.start_server(flood, "127.0.0.1", 0)
        outbox.add(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        async with dispatching(outbox):
            await outbox.until(lambda: bool(outbox.finished))
        assert sent_bytes > MAX_ANSWER_BYTES
        server.close()

    run(scenario())


def test_a_failed_notice_is_tried_again_and_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 3_600)  # nothing but the retry itself wakes it

    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            number = outbox.add(receiver.answers("/a", 503, 500, 429, 408))
            async with dispatching(outbox):
                await outbox.until(lambda: not outbox.waiting)
            assert receiver.got["/a"] == [number] * 5
            assert outbox.finished == [number]

    run(scenario())


def test_gone_ends_delivery_to_that_sink_alone() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            gone = receiver.answers("/gone", 204, 410)
            ids = [outbox.add(gone) for _ in range(20)]
            others = [outbox.add(receiver.root + "/a") for _ in range(20)]
            async with dispatching(outbox) as dispatcher:
                await outbox.until(lambda: not outbox.waiting)
            assert receiver.got["/gone"] == ids[:2]
            assert sorted(outbox.finished) == [ids[0], *others]
            assert list(outbox.given_up) == ids[1:]
            assert dispatcher.counts.gone == 1

    run(scenario())


def test_what_would_fail_again_is_given_up_and_the_next_is_sent() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            statuses = (301, 307, 400, 401, 403, 404)
            sink = receiver.answers("/a", *statuses)
            refused = [outbox.add(sink) for _ in statuses]
            accepted = outbox.add(sink)
            async with dispatching(outbox) as dispatcher:
                await outbox.until(lambda: not outbox.waiting)
            assert receiver.got == {"/a": [*refused, accepted]}
            assert list(outbox.given_up.values()) == [f"HTTP {status}" for status in statuses]
            assert dispatcher.counts.given_up == len(statuses)

    run(scenario())


def test_where_nobody_listens_it_is_tried_until_it_is_too_old() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        number = outbox.add("http://127.0.0.1:1/")
        async with dispatching(outbox, policy=replace(QUICK, max_age_s=0)):
            await outbox.until(lambda: not outbox.waiting)
        assert outbox.given_up == {number: "too old; last: ConnectError"}

    run(scenario())


def test_another_dispatcher_goes_on_where_one_was_stopped() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            stopped = asyncio.Event()

            async def second_hangs(request: Request, body: bytes) -> Response:
                if len(receiver.got["/a"]) == 2:
                    await stopped.wait()
                return Response(status_code=204)

            receiver.handlers["/a"] = second_hangs
            ids = [outbox.add(receiver.root + "/a") for _ in range(5)]
            failing = outbox.add(receiver.answers("/b", 503))
            async with dispatching(outbox, policy=replace(QUICK, first_delay_ms=50)):
                while len(receiver.got["/a"]) < 2 or not outbox.waiting[failing].attempts:
                    await asyncio.sleep(0.001)
            assert outbox.finished == ids[:1]  # what it knew when it was stopped is kept
            stopped.set()
            async with dispatching(outbox):
                await outbox.until(lambda: not outbox.waiting)
            assert receiver.got["/a"] == [*ids[:2], *ids[1:]]
            assert receiver.got["/b"] == [failing] * 2
            assert sorted(outbox.finished) == [*ids, failing]

    run(scenario())


def test_an_outbox_that_fails_stops_nothing_for_good() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            outbox.broken = True
            outbox.add(receiver.root + "/a")
            async with dispatching(outbox) as dispatcher:
                await asyncio.sleep(0)
                outbox.broken = False
                dispatcher.wake()
                await outbox.until(lambda: not outbox.waiting)

    run(scenario())
