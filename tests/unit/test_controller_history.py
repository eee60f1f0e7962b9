"""Any history of the controller: pages, moves, failures and crashes in any order."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fakes import UES, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_controller import TASK, broken_disk, check_epochs, intent, opens

from controlplane.controller import Refusal
from controlplane.evidence import JournalError
from controlplane.lease import State


class _Crash(BaseException):
    """The power goes."""


@contextlib.contextmanager
def crash_in_write(at_write: int, share: float) -> Iterator[None]:
    """The machine dies within the nth write, when a part of it is on disk."""
    writes, write = 0, os.write

    def dying(file: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == at_write:
            write(file, data[: int(share * len(data))])
            raise _Crash
        return write(file, data)

    with patch("os.write", dying):
        yield


TASK_OF = {"chat": TASK, "ears": "automatic-speech-recognition"}
PAIRS = st.tuples(st.sampled_from(UES[:3]), st.sampled_from(sorted(TASK_OF)))
ACTS = st.fixed_dictionaries(
    {
        "what": st.sampled_from(
            ["page", "page", "relocate", "relocate", "renew", "release", "tick"]
        ),
        "pair": PAIRS,
        "duration_ms": st.sampled_from([50, 1_000, 5_000, 60_000]),
        "target": st.sampled_from([None, "edge1", "edge2", "cloud"]),
    }
)


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order, the promises hold after every step."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.quick = patch("os.fdatasync")  # a process that dies loses no write
        self.quick.start()
        self.world = World(self.folder)
        self.cut_off: set[str] = set()  # leases whose drain a crash kept from the kernel

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
            self.quick.stop()
            shutil.rmtree(self.folder)

    def go(self, call: Callable[[], Awaitable[object] | object]) -> None:
        """Do something; it may be refused. The machine may die in it, and comes up again."""

        async def run() -> None:
            result = call()
            if isinstance(result, Awaitable):
                await result

        try:
            asyncio.run(run())
        except (Refusal, JournalError):
            pass
        except _Crash:
            self.crash()

    def session_id(self, pair: tuple[str, str]) -> str:
        session = self.world.ledger.session_of(*pair)
        return session.session_id if session else "none"

    def do(self, act: dict[str, Any]) -> None:
        pair, duration_ms, target = act["pair"], act["duration_ms"], act["target"]
        controller, session_id = self.world.controller, self.session_id(pair)
        calls: dict[str, Callable[[], Awaitable[object] | object]] = {
            "page": lambda: controller.page(pair[0], intent(TASK_OF[pair[1]], duration_ms)),
            "relocate": lambda: controller.relocate(session_id, target),
            "renew": lambda: controller.renew(session_id, duration_ms),
            "release": lambda: controller.release(session_id),
            "tick": controller.tick,
        }
        self.go(calls[act["what"]])

    @rule(act=ACTS)
    def step(self, act: dict[str, Any]) -> None:
        self.do(act)

    @rule(act=ACTS, at_write=st.integers(1, 3))
    def disk_fails(self, act: dict[str, Any], at_write: int) -> None:
        with broken_disk(at_write):
            self.do(act)

    @rule(act=ACTS)
    def kernel_refuses(self, act: dict[str, Any]) -> None:
        self.world.enforcer.refuse = opens
        self.do(act)
        self.world.enforcer.refuse = lambda operations: False

    @rule(
        act=ACTS,
        at_write=st.integers(1, 2),
        share=st.floats(0, 1),
    )
    def dies_writing(self, act: dict[str, Any], at_write: int, share: float) -> None:
        with crash_in_write(at_write, share):
            self.do(act)

    @rule(
        act=ACTS,
        meanwhile=st.sampled_from(["release", "renew", "tick", "wait", "page"]),
        other=PAIRS,
        wait_ms=st.sampled_from([0, 60, 900, 2_000]),
    )
    def two_at_once(
        self, act: dict[str, Any], meanwhile: str, other: tuple[str, str], wait_ms: int
    ) -> None:
        world = self.world
        session_id = self.session_id(other)

        async def happens() -> None:
            world.gateway.meanwhile = lambda: None
            world.clock.advance(wait_ms)
            with contextlib.suppress(Refusal):
                match meanwhile:
                    case "release":
                        world.controller.release(session_id)
                    case "renew":
                        world.controller.renew(session_id, 5_000)
                    case "tick":
                        world.controller.tick()
                    case "page":
                        await world.controller.page(other[0], intent(TASK_OF[other[1]]))
            self.promises()

        world.gateway.meanwhile = happens
        self.do(act)
        world.gateway.meanwhile = lambda: None

    @rule(unready=st.sets(st.sampled_from(["edge1", "edge2", "cloud"]), max_size=2))
    def anchors_change(self, unready: set[str]) -> None:
        self.world.gateway.unready = unready

    @rule(ms=st.sampled_from([1, 60, 99, 1_000, 5_000, 70_000]))
    def time_passes(self, ms: int) -> None:
        self.world.clock.advance(ms)

    @precondition(lambda self: self.world.entries())
    @rule()
    def crash(self) -> None:
        self.world.restart()
        draining = {h.terms.lease_id for h in self.world.ledger.live() if h.state is State.DRAINING}
        self.cut_off |= draining - self.world.enforcer.drains().keys()

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "world"):
            return
        world, now = self.world, self.world.clock.now
        live = list(world.ledger.live())
        by_state = {
            state: {
                held.terms.lease_id: held.deadline_ns
                for held in live
                if held.state is state and held.deadline_ns > now
            }
            for state in State
        }
        assert world.enforcer.steering() == by_state[State.COMMITTED]
        draining = by_state[State.DRAINING].items()
        assert world.enforcer.drains() == {k: v for k, v in draining if k not in self.cut_off}
        assert world.slots() == Counter(held.terms.anchor for held in live)
        for anchor in world.catalogue.anchors:
            assert world.slots().get(anchor.name, 0) <= anchor.slots
        sessions = [(session.ue, session.aisi) for session in world.ledger.sessions()]
        assert len(sessions) == len(set(sessions))
        committed = [h.terms.session_id for h in live if h.state is State.COMMITTED]
        assert len(committed) == len(set(committed))
        check_epochs(world)


AnyHistory.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyHistory = AnyHistory.TestCase
