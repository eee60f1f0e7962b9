"""An anchor's side of the control plane: heartbeats, and what their answers say to refuse.

A heartbeat says how the anchor is; its answer brings the tokens that were revoked since the last
one, the sessions that have moved away, and the names of the issuer's keys, which are fetched when
they are others. What anchors must know is thus known one heartbeat later, or sooner by asking.
While the control plane is away the anchor serves on with what it knows.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, NoReturn

import httpx
from pydantic import BaseModel, Field

from controlplane.revocations import MAX_AT_ONCE
from controlplane.verifier import Verifier, public_keys

FIRST_INTERVAL_S = 0.1  # until the control plane has said how often it wants to hear
FIRST_BACKOFF_S = 0.01
# A request is given up after so many intervals: by then its sender has been taken for dead.
TIMEOUT_INTERVALS = 4
ASK_SPACING_S = 0.01  # between heartbeats, however often somebody asks

log = logging.getLogger(__name__)


class CoreError(Exception):
    """The control plane did not answer, or not as it should; the message says what was wrong."""


@dataclass(frozen=True, slots=True)
class Report:
    """How an anchor is."""

    load: float  # 0 to 1
    ready_aisis: Iterable[str]  # services that can take a session now
    latency_ms: float | None  # of a request, measured


class _Answer(BaseModel):
    """To a heartbeat."""

    revocations: list[dict[str, Any]]
    cursor: str
    keys: list[str]  # their `kid`
    interval_ms: Annotated[float, Field(alias="intervalMs", gt=0)]


def core_client(core: str, address: IPv4Address | IPv6Address) -> httpx.AsyncClient:
    """Return a client of the control plane at `core` (URL) that speaks from an anchor's address.

    The address is what the control plane knows the anchor by.
    """
    return httpx.AsyncClient(
        base_url=core,
        transport=httpx.AsyncHTTPTransport(local_address=str(address)),
        trust_env=False,
    )


class Agent:
    """Sends the heartbeats of one anchor and keeps its verifier up to date."""

    def __init__(
        self,
        name: str,
        client: httpx.AsyncClient,
        verifier: Verifier,
        report: Callable[[], Report],
        heed: Callable[[Iterable[Mapping[str, Any]]], None],
    ) -> None:
        """`report`: what to say, asked for each heartbeat. `heed`: is given what was revoked."""
        self._name = name
        self._client = client
        self._verifier = verifier
        self._report = report
        self._heed = heed
        self._boot_id = secrets.token_hex(8)
        self._cursor: str | None = None
        self._keys: frozenset[str] = frozenset()
        self._interval_s = FIRST_INTERVAL_S
        self._failures = 0  # since the last answer
        self._wake = asyncio.Event()
        self._asked: asyncio.Event | None = None  # set once the next exchange is over

    async def ask(self) -> None:
        """Return when all is known that the control plane knew at the time of the call.

        Or when it did not answer. Only while `run` runs.
        """
        if self._asked is None:
            self._asked = asyncio.Event()
        self._wake.set()
        await self._asked.wait()

    async def introduce(self, timeout_s: float) -> None:
        """Return when the first heartbeat has been answered. CoreError after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                await self._exchange()
                return
            except CoreError as error:
                if time.monotonic() > until_s:
                    what = f"no answer to a heartbeat for {timeout_s:g} s: {error}"
                    raise CoreError(what) from error
            await asyncio.sleep(FIRST_INTERVAL_S)

    async def run(self) -> NoReturn:
        """Send a heartbeat every interval, or when asked, until cancelled."""
        while True:
            start_s = time.monotonic()
            asked, self._asked = self._asked, None
            self._wake.clear()
            try:
                complete = await self._exchange()
            except CoreError as error:
                if self._failures == 0:
                    log.warning("%s: %s; serving on", self._name, error)
                wait_s = min(FIRST_BACKOFF_S * 2**self._failures, self._interval_s)
                self._failures = min(self._failures + 1, 16)
            else:
                if self._failures:
                    log.warning("%s: the control plane answers again", self._name)
                self._failures = 0
                wait_s = start_s + self._interval_s - time.monotonic() if complete else 0
            if asked is not None:
                asked.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(wait_s, 0))
                await asyncio.sleep(start_s + ASK_SPACING_S - time.monotonic())

    async def _exchange(self) -> bool:
        """Send one heartbeat and heed its answer; return whether that said everything.

        Raises CoreError.
        """
        report = self._report()
        body = {
            "load": report.load,
            "readyAisis": list(report.ready_aisis),
            "latencyMs": report.latency_ms,
            "bootId": self._boot_id,
            "since": self._cursor,
        }
        try:
            content = await self._ask("POST", f"/anchors/{self._name}/heartbeat", body)
            answer = _Answer.model_validate_json(content)
            self._verifier.update(revocations=answer.revocations)
            self._heed(answer.revocations)
            self._cursor = answer.cursor
            self._interval_s = answer.interval_ms / 1_000
            if self._keys != frozenset(answer.keys):
                await self._fetch_keys()
        except ValueError as error:
            raise CoreError(f"the control plane answers what cannot be read: {error}") from error
        return len(answer.revocations) < MAX_AT_ONCE

    async def _fetch_keys(self) -> None:
        """Take the issuer's keys as they are now. Raises CoreError, ValueError."""
        jwks = httpx.Response(200, content=await self._ask("GET", "/.well-known/jwks.json")).json()
        self._verifier.update(jwks=jwks)
        self._keys = frozenset(public_keys(jwks))

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Return the body of a good answer. Raises CoreError."""
        timeout_s = max(TIMEOUT_INTERVALS * self._interval_s, FIRST_INTERVAL_S)
        try:
            answer = await self._client.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise CoreError(f"{self._client.base_url} does not answer: {what}") from error
        if not answer.is_success:
            raise CoreError(f"{path} is refused ({answer.status_code}): {answer.text[:500]}")
        return answer.content
