"""Control plane and user plane agent over a real Unix socket, and a user plane that records."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Flow,
    Hold,
    Install,
    Move,
    Operation,
    Parked,
    Reconciliation,
    Renew,
    Resume,
    Revoke,
    StaleEpochError,
    Usage,
)
from controlplane.five_qi import qos_flow
from controlplane.listeners import UnixListener, listen
from upf import protocol, remote
from upf.agent import Agent
from upf.remote import RemoteUserPlane

OLD = Binding(
    lease_id="5f",
    epoch=3,
    flows=(
        Flow(ip_address("10.45.0.1"), ip_address("198.18.0.1")),
        Flow(ip_address("fd00:45::1"), ip_address("fd00:a151::1")),
    ),
    anchor="edge1",
    qos=qos_flow(4, 2_000_000, 0, None, 3_000_000),
    expires_ns=2**62,
)
NEW = replace(OLD, lease_id="60", epoch=4, anchor=None, expires_ns=2**62 + 1)
EVERY_OPERATION: list[Operation] = [
    *(Install(OLD), Move(NEW, OLD, 2**61), Renew(OLD), Revoke(NEW), EndDrain(OLD)),
    *(Hold(OLD, 2**61), Resume(OLD)),
]
USAGE = Usage(uplink_packets=1, uplink_bytes=2, downlink_packets=3, downlink_bytes=2**60)
ENFORCED = Enforced(
    lease_id="60", epoch=4, flow=OLD.flows[1], anchor=None, remaining_ms=5, usage=USAGE
)
PARKED = Parked(stored=6, released=1, dropped=2, expired=0, held=3, lost_by_kernel=4)
RECONCILED = Reconciliation(adopted=("5f",), installed=("60",), removed=())


class Recorder:
    """A user plane that keeps what it is asked, and refuses what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.refuses: EnforcementError | None = None
        self.sends: Callable[[Flow], None] = lambda flow: None

    def on_first_packet(self, report: Callable[[Flow], None]) -> None:
        self.sends = report

    async def refuse(self, flows: Sequence[Flow], backoff_ms: int) -> None:
        self.asked.append((list(flows), backoff_ms))

    async def parked(self) -> Parked:
        return PARKED

    async def apply(self, operations: Sequence[Operation]) -> None:
        self.asked += operations
        if self.refuses is not None:
            raise self.refuses

    async def enforced(self) -> list[Enforced]:
        return [ENFORCED]

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        self.asked.append(bindings)
        return {"5f": USAGE}

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        self.asked.append(list(live))
        return RECONCILED

    async def drops(self) -> dict[str, int]:
        return {"spoofed_source": 2**40}


@asynccontextmanager
async def agent(path: Path, user_plane: Recorder) -> AsyncIterator[None]:
    stop = asyncio.Event()
    listening = listen(UnixListener("upf", path))
    serving = asyncio.create_task(Agent(user_plane, {"table": "t"}).serve(listening, stop))
    try:
        yield
    finally:
        stop.set()
        await serving
        path.unlink(missing_ok=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def greet(path: Path, **members: Any) -> Any:
    """Greet an agent with some members of one's own; return its first answer."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    hello = {"protocol": protocol.PROTOCOL, "role": "controller", "now_ns": time.monotonic_ns()}
    writer.write(protocol.encode({**hello, **members}))
    try:
        return await protocol.read(reader)
    finally:
        writer.close()


def test_everything_arrives_as_it_was_said(tmp_path: Path) -> None:
    async def work() -> None:
        path, user_plane = tmp_path / "upf.sock", Recorder()
        async with agent(path, user_plane), RemoteUserPlane(path) as plane:
            await plane.apply(EVERY_OPERATION)
            assert await plane.usage([OLD, NEW]) == {"5f": USAGE}
            assert await plane.reconcile(iter([OLD])) == RECONCILED
            assert user_plane.asked == [*EVERY_OPERATION, [OLD, NEW], [OLD]]
            assert await plane.enforced() == [ENFORCED]
            assert await plane.drops() == {"spoofed_source": 2**40}

    run(work())


def test_first_packets_are_told_of_between_answers(tmp_path: Path) -> None:
    async def work() -> None:
        path, user_plane = tmp_path / "upf.sock", Recorder()
        async with agent(path, user_plane), RemoteUserPlane(path) as plane:
            told: list[Flow] = []
            plane.on_first_packet(told.append)
            asked = [asyncio.create_task(plane.drops()) for _ in range(3)]
            for flow in OLD.flows:
                user_plane.sends(flow)
            assert await asyncio.gather(*asked) == [{"spoofed_source": 2**40}] * 3
            assert await plane.parked() == PARKED
            assert told == list(OLD.flows)
            await plane.refuse(OLD.flows, 5_000)
            assert user_plane.asked == [(list(OLD.flows), 5_000)]
        await asyncio.sleep(0)
        user_plane.sends(OLD.flows[0])  # nobody is there to hear it

    run(work())


def test_refusals_are_what_they_were(tmp_path: Path) -> None:
    async def work() -> None:
        path, user_plane = tmp_path / "upf.sock", Recorder()
        async with agent(path, user_plane), RemoteUserPlane(path) as plane:
            for refusal in (StaleEpochError("at 7"), EnforcementError("no such anchor")):
                user_plane.refuses = refusal
                with pytest.raises(EnforcementError) as caught:
                    await plane.apply([Install(OLD)])
                assert (type(caught.value), str(caught.value)) == (type(refusal), str(refusal))

    run(work())


def test_answers_find_who_asked_though_some_gave_up(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "upf.sock"
        async with agent(path, Recorder()), RemoteUserPlane(path) as plane:
            given_up = [asyncio.create_task(plane.drops()) for _ in range(3)]
            await asyncio.sleep(0)
            for task in given_up:
                task.cancel()
            assert await plane.enforced() == [ENFORCED]

    run(work())


def test_one_control_plane_at_a_time(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "upf.sock"
        async with agent(path, Recorder()):
            async with RemoteUserPlane(path) as first:
                with pytest.raises(EnforcementError, match=f"process {os.getpid()} is the control"):
                    async with RemoteUserPlane(path):
                        pass
                kind, found = await greet(path, role="status")
                assert (kind, found["agent"]["controllerPid"]) == (protocol.DONE, os.getpid())
                assert await first.enforced() == [ENFORCED]
            async with RemoteUserPlane(path) as next_one:
                assert await next_one.enforced() == [ENFORCED]

    run(work())


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"protocol": protocol.PROTOCOL + 1}, "install the same version"),
        ({"now_ns": time.monotonic_ns() + 10**15}, "time namespace"),
        ({"role": "king"}, "no greeting"),
        ({"role": "x" * protocol.MAX_GREETING_BYTES}, "a frame of"),
    ],
)
def test_a_stranger_is_told_why(tmp_path: Path, members: dict[str, Any], words: str) -> None:
    async def work() -> None:
        path = tmp_path / "upf.sock"
        async with agent(path, Recorder()):
            kind, why = await greet(path, **members)
            assert kind == "EnforcementError"
            assert words in why
            async with RemoteUserPlane(path) as plane:
                assert await plane.enforced() == [ENFORCED]

    run(work())


@pytest.mark.parametrize("question", [["depose", None], ["apply", [["Install", {}]]], 7])
def test_who_asks_nonsense_is_cut_off_and_the_agent_goes_on(tmp_path: Path, question: Any) -> None:
    async def work() -> None:
        path = tmp_path / "upf.sock"
        async with agent(path, Recorder()):
            reader, writer = await asyncio.open_unix_connection(str(path))
            now_ns = time.monotonic_ns()
            hello = {"protocol": protocol.PROTOCOL, "role": "controller", "now_ns": now_ns}
            writer.write(protocol.encode(hello) + protocol.encode(question))
            assert (await protocol.read(reader))[0] == protocol.DONE
            with pytest.raises(EOFError):
                await protocol.read(reader)
            writer.close()
            async with RemoteUserPlane(path) as plane:
                assert await plane.enforced() == [ENFORCED]

    run(work())


def test_what_is_asked_of_an_agent_that_restarts_waits_for_it(tmp_path: Path) -> None:
    async def work() -> None:
        path, back = tmp_path / "upf.sock", asyncio.Event()
        async with agent(path, Recorder()):
            plane = await RemoteUserPlane(path).__aenter__()
            plane.reconnected = back.set
        try:
            while plane._connection is not None:
                await asyncio.sleep(0)
            asked = asyncio.create_task(plane.enforced())
            await asyncio.sleep(0.01)
            assert not asked.done()
            async with agent(path, Recorder()):
                assert await asked == [ENFORCED]
                await back.wait()
        finally:
            await plane.__aexit__()

    run(work())


def test_what_was_asked_and_not_answered_fails(tmp_path: Path) -> None:
    class Stuck(Recorder):
        async def drops(self) -> dict[str, int]:
            self.asked.append("drops")
            await asyncio.Event().wait()
            raise AssertionError

    async def work() -> None:
        path, user_plane = tmp_path / "upf.sock", Stuck()
        async with agent(path, Recorder()):
            pass
        with pytest.raises(EnforcementError, match="start 'aipaging upf'"):
            await RemoteUserPlane(path).__aenter__()
        async with agent(path, Recorder()):
            plane = await RemoteUserPlane(path).__aenter__()
        with patch.object(remote, "PATIENCE_S", 0), pytest.raises(EnforcementError, match="away"):
            while True:
                await plane.drops()
        await plane.__aexit__()
        listening = listen(UnixListener("upf", path))
        serving = asyncio.create_task(Agent(user_plane, {}).serve(listening, asyncio.Event()))
        with patch.object(remote, "ANSWER_TIMEOUT_S", 0.05):
            async with RemoteUserPlane(path) as plane:
                with pytest.raises(EnforcementError, match="does not answer"):
                    await plane.drops()
        assert user_plane.asked == ["drops"]
        serving.cancel()

    run(work())
