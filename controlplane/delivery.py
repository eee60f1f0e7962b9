"""Delivery of notices to sinks: at least once, in order for each sink, one at a time to each.

`Outbox` is where notices wait, durably; `RetryPolicy` judges an attempt, without I/O; `Dispatcher`
does the work. Nothing here raises for what a sink does, and no secret is logged.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import Protocol

import httpx

from controlplane import http_signature
from controlplane.notifications import CONTENT_TYPE
from controlplane.sink_http import Answer, exchange
from controlplane.sink_tokens import AssertionKey, SinkTokens, TokenExpired, TokenUnavailable
from controlplane.sinks import SinkCredential

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
POLL_S = 1.0  # how late a retry can be that another process left behind
REQUEST_TIMEOUT, TOO_MANY_REQUESTS, GONE, UNAUTHORIZED = 408, 429, 410, 401
_DELAY_S = re.compile(r"[0-9]{1,18}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A notice that waits. Ids grow in the order in which notices were made."""

    delivery_id: int
    sink: str  # URI; may itself be a secret
    credential: SinkCredential | None = field(repr=False)
    body: bytes
    created_unix_ns: int
    attempts: int  # so far, all failed
    not_before_unix_ns: int


class Outbox(Protocol):
    """Where notices wait. Every method may be called again with the same arguments."""

    async def due(self, now_unix_ns: int, limit: int) -> Sequence[Delivery]:
        """Return what may be sent now, to at most `limit` sinks.

        Of each sink its oldest deliveries in the order of their ids, at least one and at most a
        few; none of a sink whose oldest one is to wait. Sinks that failed least come first.
        """

    async def done(self, ids: Sequence[int]) -> None:
        """These are delivered."""

    async def retry(self, delivery_id: int, attempts: int, not_before_unix_ns: int) -> None:
        """This one failed again, and is to wait."""

    async def give_up(self, delivery_id: int, why: str) -> None:
        """This one will not be delivered."""

    async def give_up_sink(self, sink: str, why: str) -> None:
        """None that waits for this sink will be delivered; its sessions shall make no more."""


# Verdicts


@dataclass(frozen=True, slots=True)
class Delivered:
    """The sink has it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again."""

    not_before_unix_ns: int
    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No further attempt."""

    why: str


@dataclass(frozen=True, slots=True)
class SinkGone:
    """The sink wants no more (CAMARA: 410 Gone)."""


Verdict = Delivered | Retry | GiveUp | SinkGone


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to try again: exponential backoff with jitter, until a notice is too old."""

    first_delay_ms: int = 500
    max_delay_ms: int = 300_000
    max_age_s: int = 3_600

    def judge(self, delivery: Delivery, answer: Answer, now_unix_ns: int, jitter: float) -> Verdict:
        """Return what follows from an answer. `jitter` is in [0, 1)."""
        status = answer.status
        if httpx.codes.is_success(status):
            return Delivered()
        if status == GONE:
            return SinkGone()
        why = f"HTTP {status}"
        if status in (REQUEST_TIMEOUT, TOO_MANY_REQUESTS) or httpx.codes.is_server_error(status):
            asked_ns = _retry_after_ns(answer.headers.get("retry-after"), now_unix_ns)
            return self.again(delivery, why, now_unix_ns, jitter, asked_ns)
        return GiveUp(why)

    def again(
        self, delivery: Delivery, why: str, now_unix_ns: int, jitter: float, asked_ns: int = 0
    ) -> Retry | GiveUp:
        """Return when to try again: not before the sink asked for, if it did."""
        # 2**32 exceeds every maximum, and the power stays small
        backoff_ms = min(self.max_delay_ms, self.first_delay_ms << min(delivery.attempts, 32))
        delay_ns = max(int(backoff_ms * NS_PER_MS * (1 + jitter) / 2), asked_ns)
        if now_unix_ns + delay_ns > delivery.created_unix_ns + self.max_age_s * NS_PER_S:
            return GiveUp(f"too old; last: {why}")
        return Retry(now_unix_ns + delay_ns, why)


def _retry_after_ns(value: str | None, now_unix_ns: int) -> int:
    """Return the delay asked for (RFC 9110, 10.2.3), 0 if none can be made out."""
    if value is None:
        return 0
    if _DELAY_S.fullmatch(value):
        return int(value) * NS_PER_S
    try:
        return max(0, int(parsedate_to_datetime(value).timestamp()) * NS_PER_S - now_unix_ns)
    except (ValueError, OverflowError):
        return 0


@dataclass(slots=True)
class Counts:
    """Since the start."""

    delivered: int = 0
    retried: int = 0
    given_up: int = 0
    gone: int = 0  # sinks that said so


class DispatchKey(http_signature.RequestKey, AssertionKey, Protocol):
    """A key of our JWKS, to sign requests and assertions with."""


@dataclass(slots=True)
class _Run:
    """One sink's turn."""

    sink: str
    delivered: list[int] = field(default_factory=list)
    failed: tuple[Delivery, Retry | GiveUp | SinkGone] | None = None


class Dispatcher:
    """Delivers what is in an outbox."""

    def __init__(
        self,
        outbox: Outbox,
        client: httpx.AsyncClient,
        key: Callable[[], DispatchKey],
        *,
        policy: RetryPolicy = RetryPolicy(),
        concurrency: int = 32,
        timeout_s: float = 10.0,
        now_unix_ns: Callable[[], int] = time.time_ns,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`client`: see `sink_http`. `key` returns the key to sign with now.

        `concurrency`: sinks at a time; `timeout_s`: for one attempt, all in.
        """
        self.counts = Counts()
        self._outbox = outbox
        self._client = client
        self._key = key
        self._tokens = SinkTokens(client, key)
        self._policy = policy
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._now_unix_ns = now_unix_ns
        self._jitter = jitter
        self._wake = asyncio.Event()
        self._busy: set[str] = set()  # sinks, until what came of their turn is recorded
        self._finished: list[_Run] = []

    def wake(self) -> None:
        """Say that there is something new in the outbox. From the event loop's thread only."""
        self._wake.set()

    async def run(self) -> None:
        """Deliver until cancelled; then attempts under way are broken off, and what is known kept.

        Errors of the outbox are logged, and it is asked again.
        """
        try:
            async with asyncio.TaskGroup() as turns:
                while True:
                    self._wake.clear()
                    with _logged():
                        await self._record()
                        await self._start(turns)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S):
                            await self._wake.wait()
        finally:
            with _logged():
                await self._record()

    async def _start(self, turns: asyncio.TaskGroup) -> None:
        # At most `concurrency` of the sinks it returns are busy: there is enough for all places.
        due = await self._outbox.due(self._now_unix_ns(), 2 * self._concurrency)
        for sink, deliveries in groupby(due, lambda delivery: delivery.sink):
            if len(self._busy) >= self._concurrency:
                break
            if sink not in self._busy:
                self._busy.add(sink)
                turns.create_task(self._turn(sink, list(deliveries)))

    async def _turn(self, sink: str, deliveries: Sequence[Delivery]) -> None:
        """Send in order, until one fails."""
        run = _Run(sink)
        try:
            for delivery in deliveries:
                verdict = await self._attempt(delivery)
                if not isinstance(verdict, Delivered):
                    run.failed = (delivery, verdict)
                    break
                run.delivered.append(delivery.delivery_id)
        finally:
            self._finished.append(run)
            self._wake.set()

    async def _attempt(self, delivery: Delivery) -> Verdict:
        now_unix_ns = self._now_unix_ns()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._post(delivery, now_unix_ns)
        except TokenExpired:
            return GiveUp("its access token has expired")
        except TokenUnavailable as error:
            why = str(error)
        except Exception as error:  # whatever it is, the others must go on
            why = type(error).__name__  # its message may quote a header
        else:
            if answer.status == UNAUTHORIZED and delivery.credential is not None:
                self._tokens.forget(delivery.credential)
            return self._policy.judge(delivery, answer, self._now_unix_ns(), self._jitter())
        return self._policy.again(delivery, why, self._now_unix_ns(), self._jitter())

    async def _post(self, delivery: Delivery, now_unix_ns: int) -> Answer:
        headers = {"content-type": CONTENT_TYPE}
        if delivery.credential is not None:
            token = await self._tokens.token(delivery.credential, now_unix_ns)
            headers["authorization"] = f"Bearer {token}"
        request = self._client.build_request(
            "POST", delivery.sink, content=delivery.body, headers=headers
        )
        http_signature.sign(request, self._key(), now_unix_ns // NS_PER_S)
        return await exchange(self._client, request)

    async def _record(self) -> None:
        """Make the outbox know what came of the turns that are over, all together."""
        runs = tuple(self._finished)
        if delivered := [one for run in runs for one in run.delivered]:
            await self._outbox.done(delivered)
        for run in runs:
            if run.failed is not None:
                await self._record_failure(*run.failed)
        self._finished = self._finished[len(runs) :]
        self._busy.difference_update(run.sink for run in runs)
        self.counts.delivered += len(delivered)

    async def _record_failure(self, delivery: Delivery, verdict: Retry | GiveUp | SinkGone) -> None:
        number, host = delivery.delivery_id, httpx.URL(delivery.sink).host
        match verdict:
            case Retry(not_before_unix_ns, why):
                await self._outbox.retry(number, delivery.attempts + 1, not_before_unix_ns)
                self.counts.retried += 1
                delay_s = (not_before_unix_ns - self._now_unix_ns()) / NS_PER_S
                asyncio.get_running_loop().call_later(delay_s, self._wake.set)
                log.info("notice %d to %s failed: %s; again in %.1f s", number, host, why, delay_s)
            case GiveUp(why):
                await self._outbox.give_up(number, why)
                self.counts.given_up += 1
                log.warning("notice %d to %s given up: %s", number, host, why)
            case SinkGone():
                await self._outbox.give_up_sink(delivery.sink, "HTTP 410")
                self.counts.gone += 1
                log.warning("%s is gone (410): nothing more is sent there", host)


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("the outbox failed; it is asked again")
