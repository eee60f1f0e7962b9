"""Locks: one at a time, first come first served, and whoever gives up is in nobody's way."""

import asyncio
from collections import defaultdict, deque
from contextlib import suppress

import pytest
from fake_time import FakeClock, FakeTimeLoop
from fakes import cancelled, until
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.locks import Locks

NAMES = ("a", "b", "c")


def test_first_come_first_served() -> None:
    async def run() -> None:
        locks, order = Locks(), []

        async def work(number: int) -> None:
            async with locks.hold("a"):
                order.append(number)
                await asyncio.sleep(0)
                order.append(number)

        await asyncio.gather(*(work(number) for number in range(5)))
        assert order == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert not locks.held("a")

    asyncio.run(run())


def test_a_name_given_twice_is_held_once() -> None:
    async def run() -> None:
        locks = Locks()
        async with locks.hold("a", "a", "b"):
            assert locks.held("a")
            assert locks.held("b")
        assert not locks.held("a")
        assert not locks.held("b")

    asyncio.run(run())


def test_opposite_orders_do_not_deadlock() -> None:
    async def run() -> None:
        locks = Locks()

        async def work(*names: str) -> None:
            for _ in range(20):
                async with locks.hold(*names):
                    await asyncio.sleep(0)

        async with asyncio.timeout(5):
            await asyncio.gather(work("a", "b"), work("b", "a"), work("c", "a"), work("b", "c"))

    asyncio.run(run())


def test_an_error_within_lets_go() -> None:
    async def run() -> None:
        locks = Locks()
        with pytest.raises(KeyError):
            async with locks.hold("a"):
                raise KeyError
        assert not locks.held("a")

    asyncio.run(run())


def test_who_gives_up_half_way_lets_go_of_what_it_had() -> None:
    async def run() -> None:
        locks = Locks()
        await locks.acquire("b")
        both = asyncio.create_task(locks.hold("a", "b").__aenter__())
        await until(lambda: locks.held("a"))
        await cancelled(both)
        assert not locks.held("a")
        locks.release("b")
        assert not locks.held("b")

    asyncio.run(run())


def test_who_is_cancelled_when_its_turn_has_come_passes_it_on() -> None:
    async def run() -> None:
        locks = Locks()
        await locks.acquire("a")
        second = asyncio.create_task(locks.acquire("a"))
        third = asyncio.create_task(locks.acquire("a"))
        await asyncio.sleep(0)
        locks.release("a")  # the second's turn has come, but it has not run yet
        await cancelled(second)
        async with asyncio.timeout(1):
            await third
        locks.release("a")
        assert not locks.held("a")

    asyncio.run(run())


ACTS = st.one_of(
    st.tuples(st.just("ask"), st.sets(st.sampled_from(NAMES), min_size=1)),
    st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 9)),
)


@settings(max_examples=200)
@given(st.lists(ACTS, max_size=30))
def test_whatever_happens_one_holds_each_and_nobody_is_forgotten(
    acts: list[tuple[str, object]],
) -> None:
    loop = FakeTimeLoop(FakeClock())
    locks, within = Locks(), defaultdict[str, set[int]](set)
    tasks: list[asyncio.Task[None]] = []
    leaving: dict[int, asyncio.Event] = {}
    inside: deque[int] = deque()

    async def work(number: int, names: set[str]) -> None:
        async with locks.hold(*names):
            for name in names:
                within[name].add(number)
                assert len(within[name]) == 1, f"two hold {name}"
            inside.append(number)
            try:
                await leaving[number].wait()
            finally:
                inside.remove(number)
                for name in names:
                    within[name].discard(number)

    for act, what in acts:
        if act == "ask":
            assert isinstance(what, set)
            leaving[len(tasks)] = asyncio.Event()
            tasks.append(loop.create_task(work(len(tasks), what)))
        elif tasks:
            assert isinstance(what, int)
            number = what % len(tasks)
            if act == "leave":
                leaving[number].set()
            else:
                tasks[number].cancel()
        if act != "cancel":  # a cancellation may come while the loop is busy
            loop.settle()
    for event in leaving.values():
        event.set()
    loop.settle()
    assert all(task.done() for task in tasks), "somebody waits for ever"
    assert not any(locks.held(name) for name in NAMES)
    for task in tasks:
        with suppress(asyncio.CancelledError):
            task.result()
    loop.close()
