"""Real HTTP receivers on loopback, an outbox in memory, and a dispatcher between them."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.responses import Response

from controlplane.delivery import (
    Delivery,
    Dispatcher,
    RetryPolicy,
)
from controlplane.sink_http import sink_client
from controlplane.sinks import SinkCredential

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
