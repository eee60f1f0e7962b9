"""The stream of events: complete for a reader that keeps up, bounded for one that does not."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from unittest.mock import patch

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import event_stream
from controlplane.event_stream import OVERRUN, PIECE, Broadcaster, Filter, StreamEvent

ALL = Filter()


class Log:
    """What the evidence log is to the broadcaster: an event is here before it is published."""

    def __init__(self, **options: int) -> None:
        self.events: list[StreamEvent] = []
        self.broadcaster = Broadcaster(self.replay, **options)

    def replay(self, after_id: int) -> Iterator[StreamEvent]:
        return (event for event in tuple(self.events) if event.event_id > after_id)

    def append(self, *, tenant: str = "t", ue: str = "ue1", kind: str = "COMMITTED") -> StreamEvent:
        event_id = len(self.events)
        event = StreamEvent(event_id, kind, {"n": event_id}, tenant, ue)
        self.events.append(event)
        return event

    def happen(self, count: int = 1, **members: str) -> None:
        for _ in range(count):
            self.broadcaster.publish(self.append(**members))


def run(coroutine: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


async def reading(stream: AsyncIterator[ServerSentEvent]) -> asyncio.Task[list[ServerSentEvent]]:
    """Read to the end in a task, which has begun to wait when this returns."""

    async def read() -> list[ServerSentEvent]:
        return [message async for message in stream]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    return task


def ids(messages: list[ServerSentEvent]) -> list[int]:
    return [int(message.id) for message in messages if message.id is not None]


def test_each_reader_gets_what_it_wants_in_order() -> None:
    async def scenario() -> None:
        log = Log()
        everything = await reading(log.broadcaster.subscribe(ALL))
        one_tenant = await reading(log.broadcaster.subscribe(Filter(tenant="a")))
        wanted = Filter(tenant="a", ue="ue2", kinds=frozenset({"ENDED"}))
        narrow = await reading(log.broadcaster.subscribe(wanted))
        log.happen(tenant="a")
        log.happen(tenant="b", ue="ue2", kind="ENDED")
        log.happen(tenant="a", ue="ue2", kind="ENDED")
        log.happen(tenant="a", ue="ue2")
        log.broadcaster.close()
        assert ids(await everything) == [0, 1, 2, 3]
        assert ids(await one_tenant) == [0, 2, 3]
        assert ids(await narrow) == [2]
        assert log.broadcaster.readers == 0

    run(scenario())


def test_a_slow_reader_is_told_and_resumes_without_loss_or_repetition() -> None:
    async def scenario() -> None:
        log = Log(max_waiting=10)
        slow = await reading(log.broadcaster.subscribe(ALL))
        log.happen(15)  # it does not run while we do not wait
        got = await slow
        assert ids(got) == list(range(10))
        assert got[-1].event == OVERRUN
        assert got[-1].raw_data  # without data browsers drop it
        assert log.broadcaster.readers == 0
        again = await reading(log.broadcaster.subscribe(ALL, ids(got)[-1]))
        log.happen(3)
        log.broadcaster.close()
        assert ids(got) + ids(await again) == list(range(18))

    run(scenario())


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 5)),  # durable, not yet published
            st.tuples(st.just("publish"), st.integers(1, 5)),
            st.tuples(st.just("yield"), st.integers(1, 3)),
        ),
        max_size=20,
    ),
    st.integers(-1, 10),
)
def test_from_log_to_live_nothing_is_lost_or_repeated(
    steps: list[tuple[str, int]], last_id: int
) -> None:
    async def scenario() -> None:
        log = Log(max_waiting=10**6)
        unpublished: list[StreamEvent] = []
        for _ in range(11):
            log.append()
        reader = await reading(log.broadcaster.subscribe(ALL, last_id))
        for step, count in steps:
            match step:
                case "append":
                    unpublished += [log.append() for _ in range(count)]
                case "publish":
                    for event in unpublished[:count]:
                        log.broadcaster.publish(event)
                    del unpublished[:count]
                case "yield":
                    for _ in range(count):
                        await asyncio.sleep(0)
        while not log.broadcaster.readers:  # it has caught up
            await asyncio.sleep(0)
        for event in unpublished:
            log.broadcaster.publish(event)
        log.broadcaster.close()
        assert ids(await reader) == list(range(last_id + 1, len(log.events)))

    with patch.object(event_stream, "PIECE", 2):  # others have a turn after every second event
        run(scenario())


def test_a_long_log_does_not_stop_the_others() -> None:
    async def scenario() -> None:
        log = Log()
        for _ in range(10 * PIECE):
            log.append(tenant="other")
        turns = 0
        reader = await reading(log.broadcaster.subscribe(Filter(tenant="mine"), -1))
        while not log.broadcaster.readers:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 9
        log.broadcaster.close()
        assert await reader == []

    run(scenario())


def test_over_http_it_is_an_event_stream_that_ends_when_either_side_ends_it() -> None:
    async def scenario() -> None:
        log = Log()
        app = FastAPI()

        @app.get("/events", response_class=EventSourceResponse)
        async def events() -> AsyncIterator[ServerSentEvent]:
            async for message in log.broadcaster.subscribe(ALL):
                yield message

        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            async with client.stream("GET", "/events") as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                while not log.broadcaster.readers:
                    await asyncio.sleep(0.001)
                log.happen()
                lines = response.aiter_lines()
                read = {await anext(lines) for _ in range(3)}
                assert read == {"id: 0", "event: COMMITTED", 'data: {"n":0}'}
            while log.broadcaster.readers:  # the client has gone
                await asyncio.sleep(0.001)
            async with client.stream("GET", "/events") as response:
                while not log.broadcaster.readers:
                    await asyncio.sleep(0.001)
                log.happen()
                log.broadcaster.close()
                server.should_exit = True
                assert (await response.aread()).endswith(b'data: {"n":1}\nid: 1\n\n')
        await serving

    run(scenario())
