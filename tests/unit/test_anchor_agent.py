"""What an anchor hears from the control plane it heeds one heartbeat later; alone it serves on."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.types import ASGIApp

from controlplane import aist, keys
from controlplane.keys import SigningKey
from controlplane.verifier import Verifier
from topologies.endpoints import anchor_agent
from topologies.endpoints.anchor_agent import Agent, CoreError, core_client
from topologies.endpoints.anchor_load import MEMORY_NS, Load
from topologies.endpoints.anchor_server import AnchorConfig, Service, create_app

UE, SERVICE, AISI, TASK = "10.45.0.1", "198.18.0.1", "aisi-1", "text-generation"
INTERVAL_MS = 10
S = 1_000_000_000


class Core:
    """A control plane with a list of revocations, and what it has heard."""

    def __init__(self) -> None:
        self.keys = [SigningKey(Ed25519PrivateKey.generate())]
        self.revocations: list[dict[str, Any]] = []
        self.away = False
        self.refused = 0
        self.interval_ms = INTERVAL_MS
        self.heard: list[dict[str, Any]] = []
        self.heard_s: list[float] = []
        self.jwks_read = 0
        self.heeded: list[Any] = []  # by the drainer's stead
        self._beat = asyncio.Condition()

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            self.refused += 1
            raise httpx.ConnectError("connection refused", request=request)
        if request.url.path == "/.well-known/jwks.json":
            self.jwks_read += 1
            return httpx.Response(200, json=keys.jwks([key.public for key in self.keys]))
        assert request.url.path == "/anchors/edge1/heartbeat"
        body = json.loads(request.content)
        self.heard.append(body)
        self.heard_s.append(time.monotonic())
        async with self._beat:
            self._beat.notify_all()
        known = int(body["since"] or 0)
        return httpx.Response(
            200,
            json={
                "revocations": self.revocations[known:],
                "cursor": str(len(self.revocations)),
                "keys": [key.kid for key in self.keys],
                "intervalMs": self.interval_ms,
            },
        )

    async def beats(self, count: int) -> None:
        """Return when the answers to `count` more heartbeats have been heeded."""
        wanted = len(self.heard) + count + 1  # it is heard again after it has heeded
        async with asyncio.timeout(5), self._beat:
            await self._beat.wait_for(lambda: len(self.heard) >= wanted)

    def token(self, lease_id: str, epoch: int) -> str:
        now_ns = time.time_ns()
        return aist.issue(
            self.keys[-1],
            ue="ue1",
            addresses=[UE],
            aisi=AISI,
            task=TASK,
            lease_id=lease_id,
            epoch=epoch,
            now_unix_ns=now_ns,
            lease_expires_unix_ns=now_ns + 3600 * S,
        )


Body = Callable[[Core, ASGIApp], Awaitable[None]]


def with_agent(body: Body) -> None:
    async def main() -> None:
        core = Core()
        verifier = Verifier(aist.ISSUER, {"keys": []})
        addresses = frozenset({ip_address(SERVICE)})
        config = AnchorConfig(
            name="edge1",
            services={AISI: Service(task=TASK, model="tiny", addresses=addresses)},
            verifier=verifier,
            load=Load(2),
            token_interval_ms=1,
        )
        transport = httpx.MockTransport(core.answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://core") as client:
            agent = Agent("edge1", client, verifier, config.report, core.heeded.extend)
            await agent.introduce(1)
            running = asyncio.create_task(agent.run())
            try:
                await body(core, create_app(config, agent.ask))
            finally:
                running.cancel()
                await asyncio.wait([running])

    asyncio.run(main())


async def ask(app: ASGIApp, token: str, tokens: int = 1) -> tuple[int, str]:
    """Ask for tokens as the UE; return status and, of a refusal, the message."""
    transport = httpx.ASGITransport(app, client=(UE, 40000))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{SERVICE}:8000") as ue:
        answer = await ue.post(
            "/v1/chat/completions",
            json={
                "model": AISI,
                "max_tokens": tokens,
                "messages": [{"role": "user", "content": ""}],
            },
            headers={"authorization": f"Bearer {token}"},
        )
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def floor(epoch: int, ue: str = "ue1") -> dict[str, Any]:
    return {"sub": ue, "aud": AISI, "epoch": epoch, "exp": time.time() + 3600}


def test_what_was_revoked_is_refused_after_one_heartbeat() -> None:
    async def body(core: Core, app: ASGIApp) -> None:
        one, two = core.token("l1", 1), core.token("l2", 2)
        for token in (one, two):
            assert await ask(app, token) == (200, "")
        core.revocations.append(floor(2))
        await core.beats(1)
        status, why = await ask(app, one)
        assert (status, "has ended" in why) == (401, True)
        assert await ask(app, two) == (200, "")
        assert core.heeded == core.revocations

    with_agent(body)


def test_before_a_token_is_refused_the_core_is_asked_whether_its_session_has_come_back() -> None:
    async def body(core: Core, app: ASGIApp) -> None:
        core.revocations.append(floor(2))
        await core.beats(1)
        core.interval_ms = 60_000
        await core.beats(0)
        heard = len(core.heard)
        answers = await asyncio.gather(*(ask(app, core.token("l1", 1)) for _ in range(5)))
        assert {status for status, _ in answers} == {401}
        assert len(core.heard) <= heard + 2  # one heartbeat for all
        core.revocations.append(floor(1))
        assert await ask(app, core.token("l1", 1)) == (200, "")
        core.revocations.append(floor(2))
        await ask(app, core.token("l1", 0))
        core.away = True
        assert (await ask(app, core.token("l1", 1)))[0] == 401

    with_agent(body)


def test_each_revocation_is_asked_for_once_and_a_long_list_without_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anchor_agent, "MAX_AT_ONCE", 3)

    async def body(core: Core, app: ASGIApp) -> None:
        core.interval_ms = 300
        await core.beats(1)
        core.revocations += [floor(1, f"ue{n}") for n in range(3)]
        await core.beats(1)  # brings three: there may be more
        assert core.heard_s[-1] - core.heard_s[-2] < 0.2
        core.interval_ms = INTERVAL_MS
        await core.beats(2)
        assert {heard["since"] for heard in core.heard[-2:]} == {"3"}

    with_agent(body)


def test_keys_are_fetched_when_they_are_others_and_only_then() -> None:
    async def body(core: Core, app: ASGIApp) -> None:
        await core.beats(2)
        assert core.jwks_read == 1
        old = core.token("l1", 1)
        core.keys.append(SigningKey(Ed25519PrivateKey.generate()))
        new = core.token("l2", 2)
        assert (await ask(app, new))[0] == 401
        await core.beats(1)
        assert (await ask(app, new))[0] == 200
        assert (await ask(app, old))[0] == 200
        del core.keys[0]
        await core.beats(1)
        assert (await ask(app, old))[0] == 401
        assert core.jwks_read == 3

    with_agent(body)


def test_it_serves_on_without_the_core_and_speaks_up_as_soon_as_it_is_back() -> None:
    async def body(core: Core, app: ASGIApp) -> None:
        revoked, good = core.token("l1", 1), core.token("l2", 2)
        core.revocations.append(floor(2))
        await core.beats(1)
        core.away = True
        async with asyncio.timeout(5):
            while core.refused < 12:  # doubling without a limit, the twelfth came after 40 s
                await asyncio.sleep(INTERVAL_MS / 1000)
        heard = len(core.heard)
        assert (await ask(app, good))[0] == 200
        assert (await ask(app, revoked))[0] == 401
        core.away = False
        await core.beats(0)
        assert core.heard[heard]["since"] == "1"
        assert core.heard[heard]["bootId"] == core.heard[0]["bootId"]

    with_agent(body)


def test_it_reports_what_it_does() -> None:
    async def body(core: Core, app: ASGIApp) -> None:
        await core.beats(0)
        assert core.heard[-1]["latencyMs"] is None
        assert (core.heard[-1]["load"], core.heard[-1]["readyAisis"]) == (0, [AISI])
        streams = [asyncio.create_task(ask(app, core.token("l1", 1), 500))]
        await core.beats(1)
        assert (core.heard[-1]["load"], core.heard[-1]["readyAisis"]) == (0.5, [AISI])
        assert core.heard[-1]["latencyMs"] > 0
        streams.append(asyncio.create_task(ask(app, core.token("l1", 1), 500)))
        await core.beats(1)
        assert (core.heard[-1]["load"], core.heard[-1]["readyAisis"]) == (1, [])
        for stream in streams:
            assert (await stream)[0] == 200

    with_agent(body)


def test_latency_is_that_of_requests_of_late() -> None:
    load = Load(1)
    assert load.latency_ms(0) is None
    load.answered(0, 10_000_000)
    assert load.latency_ms(10_000_000) == 10
    load.answered(10_000_000, 40_000_000)
    assert load.latency_ms(40_000_000) == 14
    later_ns = 40_000_000 + MEMORY_NS + 1
    assert load.latency_ms(later_ns) is None
    load.answered(later_ns - 2_000_000, later_ns)
    assert load.latency_ms(later_ns) == 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (httpx.Response(404, text='{"detail": "there is no anchor edge1"}'), "no anchor edge1"),
        (httpx.Response(200, text="<html>"), "cannot be read"),
        (httpx.ConnectError("connection refused"), "connection refused"),
    ],
)
def test_an_anchor_that_nobody_answers_says_why(
    answer: httpx.Response | Exception, why: str
) -> None:
    def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def main() -> None:
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://core") as client:
            verifier, config = Verifier(aist.ISSUER, {"keys": []}), Load(1)
            report = anchor_agent.Report(config.fraction, (), None)
            await Agent("edge1", client, verifier, lambda: report, list).introduce(0.05)

    with pytest.raises(CoreError, match=why):
        asyncio.run(main())


def test_it_speaks_from_its_own_address() -> None:
    async def main() -> str:
        peers: list[str] = []

        async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peers.append(writer.get_extra_info("peername")[0])
            writer.close()

        listening = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with (
            await asyncio.start_server(handle, sock=listening),
            core_client(url, ip_address("127.0.0.2")) as client,
        ):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/")
        return peers[0]

    assert asyncio.run(main()) == "127.0.0.2"
