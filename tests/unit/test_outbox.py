"""The outbox in the store keeps the contract of `delivery.Outbox`, whatever it is asked."""

import asyncio
import json
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.delivery import Delivery
from controlplane.sqlite_outbox import PER_SINK, SqliteOutbox
from controlplane.sqlite_store import SqliteStore
from controlplane.store import Notice, Sink, StoreError, Write

ALL = 1_000
URIS = ("https://a.example/1", "https://b.example/2", "https://c.example/3")
CREDENTIAL = json.dumps(
    {
        "credentialType": "ACCESSTOKEN",
        "accessToken": "secret",
        "accessTokenExpiresUtc": "2030-01-01T00:00:00Z",
        "accessTokenType": "bearer",
    }
)


class Box:
    """A store with its outbox, and a loop to ask it in."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "control.db"
        self.loop = asyncio.new_event_loop()
        self.open()

    def open(self) -> None:
        self.store = SqliteStore(self.path)
        self.outbox = SqliteOutbox(self.store)

    def close(self) -> None:
        self.store.close()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def sink(self, session: str, uri: str = URIS[0], credential: str | None = None) -> None:
        self.store.write(Write([], sinks=[Sink(session, uri, credential)]))

    def tell(self, session: str, body: str, *, last: bool = False) -> None:
        self.store.write(Write([], notices=[Notice(session, body.encode(), 1, last)]))

    def due(self, now: int = 0, limit: int = ALL) -> list[Delivery]:
        return list(self.run(self.outbox.due(now, limit)))

    def bodies(self, now: int = 0) -> list[str]:
        return [one.body.decode() for one in self.due(now)]

    def sinks(self) -> set[str]:
        return set(self.store.with_sink())


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.close()


def test_a_notice_comes_with_what_it_takes_to_deliver_it(box: Box) -> None:
    box.sink("s", credential=CREDENTIAL)
    box.tell("s", "hello")
    [delivery] = box.due()
    assert (delivery.sink, delivery.body, delivery.created_unix_ns) == (URIS[0], b"hello", 1)
    assert (delivery.attempts, delivery.not_before_unix_ns) == (0, 0)
    assert delivery.credential is not None
    assert "secret" not in repr(delivery)
    box.run(box.outbox.done([delivery.delivery_id]))
    assert box.due() == []
    assert box.sinks() == {"s"}


def test_a_session_without_a_sink_makes_no_notices(box: Box) -> None:
    box.tell("s", "hello")
    assert box.due() == []


def test_a_sink_gets_a_few_at_a_time_in_order(box: Box) -> None:
    box.sink("s")
    for number in range(PER_SINK + 3):
        box.tell("s", str(number))
    assert box.bodies() == [str(number) for number in range(PER_SINK)]
    box.run(box.outbox.done([one.delivery_id for one in box.due()[:5]]))
    assert box.bodies()[0] == "5"


def test_a_sink_whose_oldest_has_to_wait_gets_nothing_and_others_do(box: Box) -> None:
    box.sink("s")
    box.sink("t", URIS[1])
    for session in ("s", "s", "t"):
        box.tell(session, session)
    [first, *_] = box.due()
    box.run(box.outbox.retry(first.delivery_id, 1, 500))
    assert box.bodies(499) == ["t"]
    assert box.bodies(500) == ["t", "s", "s"]  # who failed least comes first
    [*_, again, _] = box.due(500)
    assert (again.attempts, again.not_before_unix_ns) == (1, 500)


def test_the_last_notice_of_a_session_takes_its_credential_along(box: Box) -> None:
    box.sink("s", credential=CREDENTIAL)
    box.sink("t", credential=CREDENTIAL)
    box.tell("s", "bye", last=True)
    box.tell("t", "hello")
    bye, hello = box.due()
    box.run(box.outbox.done([hello.delivery_id]))
    assert box.sinks() == {"s", "t"}
    box.run(box.outbox.done([bye.delivery_id]))
    assert box.sinks() == {"t"}
    box.tell("s", "one more")
    assert box.due() == []


def test_giving_one_up_lets_the_next_one_go(box: Box) -> None:
    box.sink("s")
    box.tell("s", "1")
    box.tell("s", "2", last=True)
    [first, second] = box.due()
    box.run(box.outbox.give_up(first.delivery_id, "HTTP 400"))
    assert box.bodies() == ["2"]
    box.run(box.outbox.give_up(second.delivery_id, "too old"))
    assert box.sinks() == set()


def test_a_sink_that_is_gone_is_told_nothing_more(box: Box) -> None:
    for session, uri in (("s", URIS[0]), ("t", URIS[0]), ("u", URIS[1])):
        box.sink(session, uri)
        box.tell(session, session)
    box.run(box.outbox.give_up_sink(URIS[0], "HTTP 410"))
    for session in ("s", "t", "u"):
        box.tell(session, f"{session} again")
    assert box.bodies() == ["u", "u again"]
    assert box.sinks() == {"u"}


def test_every_method_may_be_called_again(box: Box) -> None:
    box.sink("s")
    box.tell("s", "1")
    box.tell("s", "2", last=True)
    [first, second] = box.due()
    for _ in range(2):
        box.run(box.outbox.retry(first.delivery_id, 1, 5))
        box.run(box.outbox.done([first.delivery_id]))
    for _ in range(2):
        box.run(box.outbox.retry(first.delivery_id, 2, 9))  # too late: it is delivered
        box.run(box.outbox.give_up(second.delivery_id, "why"))
        box.run(box.outbox.give_up_sink(URIS[0], "why"))
    assert box.due(ALL) == []


def test_a_credential_that_cannot_be_read_stands_in_nobodys_way(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    box.sink("s", credential='{"accessToken": "secret"}')
    box.sink("t", URIS[1])
    box.tell("s", "1")
    box.tell("t", "2")
    assert box.bodies() == ["2"]
    box.sink("s", credential=CREDENTIAL)
    box.tell("s", "3")
    assert sorted(box.bodies()) == ["2", "3"]
    assert "secret" not in caplog.text


def test_notices_wait_through_a_restart(box: Box) -> None:
    box.sink("s", credential=CREDENTIAL)
    box.tell("s", "1")
    [first] = box.due()
    box.run(box.outbox.retry(first.delivery_id, 3, 7))
    box.store.close()
    box.open()
    [again] = box.due(7)
    assert (again.delivery_id, again.attempts, again.credential) == (
        *(first.delivery_id, 3),
        first.credential,
    )
    box.run(box.outbox.done([again.delivery_id]))
    box.tell("s", "2")
    [second] = box.due()
    assert second.delivery_id > first.delivery_id  # ids are not used again


def test_a_store_that_fails_says_so(box: Box) -> None:
    box.store.connection.close()
    with pytest.raises(StoreError):
        box.due()
    box.open()


# Any order


@dataclass(slots=True)
class Waiting:
    number: int
    session: str
    uri: str
    last: bool
    attempts: int = 0
    not_before: int = 0


class AnyOrder(RuleBasedStateMachine):
    """Against a list."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.box = Box(Path(self.folder.name))
        self.box.store.connection.execute("PRAGMA synchronous = OFF")
        self.waiting: list[Waiting] = []
        self.sinks: dict[str, str] = {}
        self.now, self.told = 0, 0

    def teardown(self) -> None:
        if hasattr(self, "box"):
            self.box.close()
            self.folder.cleanup()

    def expected(self, limit: int) -> list[int]:
        heads: dict[str, list[Waiting]] = {}
        for one in self.waiting:
            heads.setdefault(one.uri, []).append(one)
        due = [some for some in heads.values() if some[0].not_before <= self.now]
        due.sort(key=lambda some: (some[0].attempts, some[0].number))
        return [one.number for some in due[:limit] for one in some[:PER_SINK]]

    def forget(self, over: Waiting) -> None:
        self.waiting.remove(over)
        if over.last:
            self.sinks.pop(over.session, None)

    @rule(session=st.sampled_from("abcd"), uri=st.sampled_from(URIS))
    def a_session_begins(self, session: str, uri: str) -> None:
        if all(one.session != session for one in self.waiting):
            self.box.sink(session, uri)
            self.sinks[session] = uri

    @rule(session=st.sampled_from("abcd"), last=st.booleans(), times=st.integers(1, 10))
    def a_session_tells(self, session: str, last: bool, times: int) -> None:
        for _ in range(times):
            self.box.tell(session, "body", last=last)
            if session in self.sinks:
                self.told += 1
                self.waiting.append(Waiting(self.told, session, self.sinks[session], last))

    @precondition(lambda self: self.waiting)
    @rule(some=st.sets(st.integers(0, 20), min_size=1, max_size=4))
    def some_are_delivered(self, some: set[int]) -> None:
        over = [self.waiting[at % len(self.waiting)] for at in sorted(some)]
        over = list({one.number: one for one in over}.values())
        self.box.run(self.box.outbox.done([one.number for one in over]))
        for one in over:
            self.forget(one)

    @precondition(lambda self: self.waiting)
    @rule(at=st.integers(0, 20), more=st.integers(0, 3))
    def one_fails(self, at: int, more: int) -> None:
        one = self.waiting[at % len(self.waiting)]
        one.attempts, one.not_before = one.attempts + 1, self.now + more
        self.box.run(self.box.outbox.retry(one.number, one.attempts, one.not_before))

    @rule(uri=st.sampled_from(URIS))
    def a_sink_is_gone(self, uri: str) -> None:
        self.box.run(self.box.outbox.give_up_sink(uri, "HTTP 410"))
        self.waiting = [one for one in self.waiting if one.uri != uri]
        self.sinks = {session: other for session, other in self.sinks.items() if other != uri}

    @rule(by=st.integers(1, 3))
    def time_passes(self, by: int) -> None:
        self.now += by

    @rule(limit=st.integers(1, 2))
    def it_is_asked_for_few(self, limit: int) -> None:
        found = [one.delivery_id for one in self.box.due(self.now, limit)]
        assert found == self.expected(limit)

    @invariant()
    def it_is_as_expected(self) -> None:
        if hasattr(self, "box"):
            found = self.box.due(self.now)
            assert [one.delivery_id for one in found] == self.expected(ALL)
            uris = {one.number: one.uri for one in self.waiting}
            assert all(one.sink == uris[one.delivery_id] for one in found)
            assert self.box.sinks() == self.sinks.keys()


AnyOrder.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = AnyOrder.TestCase
