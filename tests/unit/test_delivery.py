"""Delivery to real HTTP receivers on loopback, and the verdict on each attempt."""

import asyncio
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from http_message_signatures import (
    HTTPMessageVerifier,
    InvalidSignature,
    MappingKeyResolver,
    algorithms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from controlplane import delivery
from controlplane.delivery import (
    Delivered,
    Delivery,
    Dispatcher,
    GiveUp,
    Retry,
    RetryPolicy,
    SinkGone,
)
from controlplane.sink_http import MAX_ANSWER_BYTES, Answer, sink_client
from controlplane.sinks import SinkCredential, read_credential

NS = 1_000_000_000
MS = 1_000_000
START = 1_700_000_000 * NS
QUICK = RetryPolicy(first_delay_ms=1, max_delay_ms=10)
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class Key:
    kid = "the-kid"

    def sign_bytes(self, data: bytes) -> bytes:
        return PRIVATE.sign(data)

    def sign(self, typ: str, claims: Mapping[str, object]) -> str:
        headers = {"typ": typ, "kid": self.kid}
        return jwt.encode(dict(claims), PRIVATE, algorithm="EdDSA", headers=headers)


class MemoryOutbox:
    """The contract of `Outbox`, without durability."""

    def __init__(self) -> None:
        self.waiting: dict[int, Delivery] = {}
        self.finished: list[int] = []
        self.given_up: dict[int, str] = {}
        self.changed = asyncio.Event()
        self.broken = False
        self._next_id = 1

    def add(self, sink: str, credential: SinkCredential | None = None) -> int:
        number = self._next_id
        self._next_id += 1
        self.waiting[number] = Delivery(
            delivery_id=number,
            sink=sink,
            credential=credential,
            body=b'{"number":%d}' % number,
            created_unix_ns=time.time_ns(),
            attempts=0,
            not_before_unix_ns=0,
        )
        return number

    async def due(self, now_unix_ns: int, limit: int) -> Sequence[Delivery]:
        if self.broken:
            raise OSError("disk full")
        by_sink: dict[str, list[Delivery]] = defaultdict(list)
        for number in sorted(self.waiting):
            by_sink[self.waiting[number].sink].append(self.waiting[number])
        due = [some for some in by_sink.values() if some[0].not_before_unix_ns <= now_unix_ns]
        due.sort(key=lambda some: some[0].attempts)
        return [one for some in due[:limit] for one in some[:3]]

    async def done(self, ids: Sequence[int]) -> None:
        for number in ids:
            del self.waiting[number]
            self.finished.append(number)
        self.changed.set()

    async def retry(self, delivery_id: int, attempts: int, not_before_unix_ns: int) -> None:
        self.waiting[delivery_id] = replace(
            self.waiting[delivery_id], attempts=attempts, not_before_unix_ns=not_before_unix_ns
        )
        self.changed.set()

    async def give_up(self, delivery_id: int, why: str) -> None:
        del self.waiting[delivery_id]
        self.given_up[delivery_id] = why
        self.changed.set()

    async def give_up_sink(self, sink: str, why: str) -> None:
        for number in [number for number, one in self.waiting.items() if one.sink == sink]:
            await self.give_up(number, why)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


Handler = Callable[[Request, bytes], Awaitable[Response]]


@dataclass
class Receiver:
    """A server; each path is a sink of its own."""

    root: str = ""
    got: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by path
    handlers: dict[str, Handler] = field(default_factory=dict)
    under_way: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        path = request.url.path
        self.under_way[path] += 1
        self.most_at_once = max(self.most_at_once, self.under_way[path])
        body = await request.body()
        if path != "/token":
            self.got[path].append(json.loads(body)["number"])
        try:
            handler = self.handlers.get(path)
            response = (
                Response(status_code=204) if handler is None else await handler(request, body)
            )
        finally:
            self.under_way[path] -= 1
        await response(scope, receive, send)

    def answers(self, path: str, *statuses: int) -> str:
        """Answer with these in turn, then with 204."""
        left = iter(statuses)

        async def handler(request: Request, body: bytes) -> Response:
            elsewhere = {"location": self.root + "/elsewhere"}
            return Response(status_code=next(left, 204), headers=elsewhere)

        self.handlers[path] = handler
        return self.root + path


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    config = uvicorn.Config(
        receiver, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    receiver.root = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield receiver
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def dispatching(outbox: MemoryOutbox, **options: Any) -> AsyncIterator[Dispatcher]:
    options = {"policy": QUICK, "jitter": lambda: 0.5, **options}
    async with sink_client() as client:
        dispatcher = Dispatcher(outbox, client, Key, **options)
        running = asyncio.create_task(dispatcher.run())
        try:
            yield dispatcher
            assert not running.done()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def run(coroutine: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


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


def test_receivers_can_verify_what_they_get() -> None:
    keys = MappingKeyResolver(public_keys={Key.kid: PRIVATE.public_key()}, private_keys={})
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=keys)

    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:

            async def check(request: Request, body: bytes) -> Response:
                assert request.headers["content-type"] == "application/cloudevents+json"
                needed = ("@method", "@target-uri", "content-type", "content-digest")
                verifier.verify(request, body=body, require_components=needed)
                with pytest.raises(InvalidSignature):
                    verifier.verify(request, body=body + b" ")
                return Response(status_code=204)

            receiver.handlers["/a"] = check
            outbox.add(receiver.root + "/a?session=%20x")
            async with dispatching(outbox, policy=replace(QUICK, max_age_s=0)):
                await outbox.until(lambda: not outbox.waiting)
            assert outbox.finished

    run(scenario())


def access_token(token: str, expires: str = "2099-01-01T00:00:00Z") -> SinkCredential:
    members = {"accessToken": token, "accessTokenType": "bearer", "accessTokenExpiresUtc": expires}
    return read_credential(json.dumps({"credentialType": "ACCESSTOKEN", **members}))


def test_the_token_goes_to_the_sink_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:

            async def check(request: Request, body: bytes) -> Response:
                authorized = request.headers.get("authorization") == "Bearer s3cr3t"
                return Response(status_code=503 if authorized else 401)

            receiver.handlers["/a"] = check
            outbox.add(receiver.root + "/a", access_token("s3cr3t"))
            expired = outbox.add(
                receiver.root + "/b", access_token("s3cr3t", "2020-01-01T00:00:00Z")
            )
            async with dispatching(outbox):
                await outbox.until(lambda: outbox.waiting[1].attempts == 3)
            assert outbox.given_up == {expired: "its access token has expired"}
            assert not receiver.got["/b"]
            assert "s3cr3t" not in repr(outbox.waiting)

    run(scenario())
    assert "HTTP 503" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_private_key_jwt_gets_a_token_once_and_again_when_it_is_refused() -> None:
    async def scenario() -> None:
        outbox = MemoryOutbox()
        async with receiving() as receiver:
            issued: list[str] = []

            async def token(request: Request, body: bytes) -> Response:
                form = parse_qs(body.decode())
                claims = jwt.decode(
                    form["client_assertion"][0],
                    PRIVATE.public_key(),
                    algorithms=["EdDSA"],
                    audience=receiver.root + "/token",
                    issuer="the-client",
                    options={"require": ["iss", "sub", "aud", "exp", "jti"]},
                )
                assert claims["sub"] == "the-client"
                assert form["grant_type"] == ["client_credentials"]
                issued.append(f"token-{len(issued)}")
                answer = {"access_token": issued[-1], "token_type": "Bearer", "expires_in": 60}
                return JSONResponse(answer, 503 if len(issued) == 1 else 200)

            async def check(request: Request, body: bytes) -> Response:
                expected = f"Bearer {issued[-1]}"
                assert request.headers["authorization"] == expected
                return Response(status_code=401 if len(receiver.got["/a"]) == 2 else 204)

            receiver.handlers |= {"/token": token, "/a": check}
            members = {"clientId": "the-client", "tokenUri": receiver.root + "/token"}
            credential = read_credential(
                json.dumps({"credentialType": "PRIVATE_KEY_JWT", **members})
            )
            ids = [outbox.add(receiver.root + "/a", credential) for _ in range(4)]
            async with dispatching(outbox):
                await outbox.until(lambda: not outbox.waiting)
            assert outbox.finished == [ids[0], *ids[2:]]
            assert outbox.given_up == {ids[1]: "HTTP 401"}
            assert len(issued) == 3  # one that failed, one for each token

    run(scenario())


# The verdict


def waiting(attempts: int = 0) -> Delivery:
    return Delivery(
        delivery_id=1,
        sink="https://host/",
        credential=None,
        body=b"",
        created_unix_ns=START,
        attempts=attempts,
        not_before_unix_ns=0,
    )


@settings(deadline=None)
@given(
    status=st.integers(200, 599),
    attempts=st.integers(0, 10**6),
    age_ms=st.integers(0, 4_000_000),
    jitter=st.floats(0, 1, exclude_max=True),
    retry_after_s=st.none() | st.integers(0, 10_000),
)
def test_retries_are_bounded_and_never_sooner_than_asked(
    status: int, attempts: int, age_ms: int, jitter: float, retry_after_s: int | None
) -> None:
    policy = RetryPolicy()
    now = START + age_ms * MS
    headers = httpx.Headers({} if retry_after_s is None else {"retry-after": str(retry_after_s)})
    verdict = policy.judge(waiting(attempts), Answer(status, headers, b""), now, jitter)

    asked_ns = (retry_after_s or 0) * NS
    longest_ns = min(policy.first_delay_ms * 2 ** min(attempts, 40), policy.max_delay_ms) * MS
    last_ns = START + policy.max_age_s * NS
    if 200 <= status < 300:
        assert verdict == Delivered()
    elif status == 410:
        assert verdict == SinkGone()
    elif status not in (408, 429) and status < 500:
        assert verdict == GiveUp(f"HTTP {status}")
    elif isinstance(verdict, Retry):
        delay_ns = verdict.not_before_unix_ns - now
        assert max(asked_ns, longest_ns // 2) <= delay_ns <= max(asked_ns, longest_ns)
        assert verdict.not_before_unix_ns <= last_ns
    else:
        assert isinstance(verdict, GiveUp)
        assert now + max(asked_ns, longest_ns) > last_ns


@pytest.mark.parametrize(
    ("value", "delay_s"),
    [
        ("120", 120),
        ("Tue, 14 Nov 2023 22:15:20 GMT", 120),  # START is 22:13:20
        ("Tue, 14 Nov 2023 20:00:00 GMT", 0),
        ("-5", 0),
        ("soon", 0),
        ("Tue, 14 Nov 99999999999 22:15:20 GMT", 0),
        ("9" * 5_000, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, delay_s: int) -> None:
    policy = RetryPolicy(first_delay_ms=0)
    answer = Answer(503, httpx.Headers({"retry-after": value}), b"")
    assert policy.judge(waiting(), answer, START, 0.0) == Retry(START + delay_s * NS, "HTTP 503")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_retry_after_is_read(value: str) -> None:
    answer = Answer(503, httpx.Headers([(b"retry-after", value.encode())]), b"")
    RetryPolicy().judge(waiting(), answer, START, 0.0)
