"""A control plane in one process: the real service, fake time, fake user plane, fake anchors.

`World` is all of it. Its event loop has fake time too: where everything waits, time passes at once,
so that nothing here ever sleeps. Work can be held up (`Gate`) on its way to the disk, to the kernel
and to anchors. Store, kernel and clock outlive the control plane.
"""

import asyncio
import functools
import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock, patch

from catalogues import CATALOGUE
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_parts import (
    FakeEnforcer,
    FakeFirstPackets,
    FakeGateway,
    FakeOutbox,
    FileStore,
    MemoryStore,
)
from fake_time import FakeClock, FakeTimeLoop, Gate

from controlplane import canonical
from controlplane.admission import Rates
from controlplane.answers import Grant, Refusal
from controlplane.catalogue import Catalogue
from controlplane.configfile import parse_yaml
from controlplane.controller import Settings
from controlplane.enforcement import EnforcementError, Flow, Install, Move, Operation, Renew
from controlplane.fleet import Heartbeat
from controlplane.granting import SinkRequest
from controlplane.intent import Intent
from controlplane.keys import KeyRing
from controlplane.lease import Lease
from controlplane.paging import Page, QosRequest
from controlplane.parties import Subscriber, Subscription
from controlplane.policy import Policy, Tenant, Tenants
from controlplane.service import Network, Options, Service
from controlplane.triggers import TriggerSettings
from controlplane.verification import Verdict, verify_log

KEY = Ed25519PrivateKey.generate()
PREPARE_MS, DRAIN_MS = 2_000, 100
TASK = "text-generation"
MBPS = 1_000_000
UES = tuple(f"ue{n}" for n in range(1, 9))
CELLS = {"gnb1": Rates(10 * MBPS, 10 * MBPS), "gnb2": Rates(5 * MBPS, 5 * MBPS)}
SINK = SinkRequest(uri="https://app.example/notices", credential=None)
_FOLDER = tempfile.TemporaryDirectory()
KEYS = KeyRing.open(Path(_FOLDER.name) / "keys", 1)
_KEPT = 100 * 365 * 86_400  # the key is not rotated


def catalogue(text: str = CATALOGUE) -> Catalogue:
    return parse_yaml(text, Catalogue, "catalogue.yaml")


def subscribers(subscription: Subscription | None = None) -> list[Subscriber]:
    """Every UE has the subscription."""
    subscriptions = () if subscription is None else (subscription,)
    return [
        Subscriber(
            *(ue, IPv4Address(f"10.45.0.{n}"), IPv6Address(f"fd00:45::{n}"), "gnb1"),
            subscriptions=subscriptions,
        )
        for n, ue in enumerate(UES, start=1)
    ]


def intent(task: str = TASK, duration_ms: int = 60_000, **members: Any) -> Intent:
    return Intent.model_validate({"task": task, "durationMs": duration_ms, **members})


class World:
    """A control plane and all around it."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        catalogue_text: str = CATALOGUE,
        settings: Settings | None = None,
        triggers: TriggerSettings | None = None,
        tenants: Mapping[str, Policy] | None = None,
        cells: Mapping[str, Rates] = CELLS,
        anchors: Sequence[str] = ("edge1", "edge2", "edge3", "cloud"),
        subscription: Subscription | None = None,
    ) -> None:
        """With a folder the store is a file in it, else it is in memory."""
        self.folder = folder
        self.trace: list[str] = []
        self.clock = FakeClock()
        self.catalogue = catalogue(catalogue_text)
        self.gateway = FakeGateway(self.trace)
        self.enforcer = FakeEnforcer(self.clock, self.trace)
        self.first_packets = FakeFirstPackets()
        self._tenants = Tenants(
            tenants=tuple(Tenant(name=name, policy=p) for name, p in (tenants or {}).items())
        )
        self._network = Network(
            subscribers=subscribers(subscription),
            cells=cells,
            attachment_points=anchors,
            anchor_addresses={},
        )
        self._options = Options(
            settings=settings or Settings(prepare_ms=PREPARE_MS, drain_ms=DRAIN_MS),
            triggers=triggers or TriggerSettings(),
            key_rotation_s=_KEPT,
        )
        self.loop = FakeTimeLoop(self.clock)
        self._memory = MemoryStore(self.trace)
        self._running: AsyncExitStack | None = None

    def __enter__(self) -> Self:
        self.run(self.start())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._running is not None:
                self.run(self.stop())
        finally:
            self.close()

    def close(self) -> None:
        """Leave, whatever is still going on."""
        if asyncio.all_tasks(self.loop):
            self.loop.run_until_complete(self.crash())
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something to its end; time passes where everything waits."""

        async def bounded() -> Any:
            async with asyncio.timeout(10 * 86_400):  # of fake time
                return await work

        return self.loop.run_until_complete(bounded())

    # Start, stop, crash

    async def start(self) -> None:
        self.store: MemoryStore | FileStore = self._memory
        if self.folder is not None:
            self.store = FileStore(self.folder / "control.db", self.trace)
        with patch("controlplane.service.sink_client", Mock()):
            self.service = Service(
                catalogue=self.catalogue,
                network=self._network,
                tenants=self._tenants,
                store=self.store,
                outbox=FakeOutbox(),
                keys=KEYS,
                evidence_key=KEY,
                enforcer=self.enforcer,
                first_packets=self.first_packets,
                gateway=self.gateway,
                clock=self.clock,  # type: ignore[arg-type]
                options=self._options,
            )
        self.plane = self.service.plane
        self.controller, self.ledger = self.plane.controller, self.plane.controller.ledger
        self.keeper = self.plane.keeper
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self.service.running())

    async def stop(self) -> None:
        """Stop as a service stops."""
        assert self._running is not None
        await self._running.aclose()
        self.store.close()
        self._running = None

    async def crash(self) -> None:
        """The process dies: nothing that was on its way is ever done."""
        self.enforcer.gate, self.gateway.gate, self.store.gate = Gate(), Gate(), Gate()
        self.store.full = True
        with patch.object(self.enforcer, "apply", _never), patch("logging.Logger.critical"):
            mine = asyncio.current_task()
            tasks = [task for task in asyncio.all_tasks() if task is not mine]
            for _ in range(3):  # some have to finish something first
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._running is not None:
                with suppress(asyncio.CancelledError, Exception):
                    await self._running.aclose()  # nothing is left for it to do
        self.store.full = False
        self.store.close()
        self._running = None

    async def restart(self) -> None:
        """Crash and come up again."""
        await self.crash()
        await self.start()

    # What a client does

    async def page(
        self,
        ue: str = "ue1",
        *,
        tenant: str = "default",
        key: str | None = None,
        sink: SinkRequest | None = None,
        **members: Any,
    ) -> Grant:
        wanted = Page(tenant=tenant, ue=ue, intent=intent(**members), key=key, sink=sink)
        return await self.plane.pager.page(wanted)

    async def qos(
        self,
        ue: str = "ue1",
        profile: str = "QOS_G",
        *,
        server: str = "203.0.113.9",
        duration_ms: int = 60_000,
        tenant: str = "default",
        key: str | None = None,
        sink: SinkRequest | None = None,
    ) -> Grant:
        number = UES.index(ue) + 1
        flow = Flow(IPv4Address(f"10.45.0.{number}"), IPv4Address(server))
        return await self.plane.pager.qos(
            QosRequest(
                tenant=tenant,
                ue=ue,
                aisi=f"qod:{server}",
                flows=(flow,),
                profile=profile,
                duration_ms=duration_ms,
                request=canonical.canonical({"server": server, "ue": ue}).decode(),
                key=key,
                sink=sink,
            )
        )

    async def relocate(self, grant: Grant, target: str | None = None, **options: Any) -> Grant:
        return await self.plane.relocator.relocate(session_id(grant), target, **options)

    async def extend(self, grant: Grant, additional_ms: int) -> Lease:
        return await self.controller.extend(session_id(grant), additional_ms)

    async def release(self, grant: Grant) -> None:
        await self.controller.release(session_id(grant))

    async def heartbeat(self, anchor: str, **members: Any) -> None:
        described = self.ledger.fleet.anchor(anchor)
        assert described is not None
        said: dict[str, Any] = {
            "boot_id": "first",
            "load": 0.0,
            "ready_aisis": frozenset(hosting.aisi for hosting in described.hosts),
        }
        await self.keeper.heartbeat(anchor, Heartbeat(**said | members))

    async def heartbeats(self, *anchors: str) -> None:
        """Say that these live, and their services are ready, for ever."""
        while True:
            for anchor in anchors:
                await self.heartbeat(anchor)
            await asyncio.sleep(0.05)

    async def drain(self, anchor: str) -> None:
        await self.keeper.record(self.ledger.fleet.drain(anchor))

    async def sleep(self, ms: float) -> None:
        await asyncio.sleep(ms / 1_000)

    # What can be seen

    def lines(self) -> list[bytes]:
        return list(self.store.replay())

    def entries(self) -> list[dict[str, Any]]:
        """What was journalled, but for starts and acknowledgements."""
        found = [json.loads(line) for line in self.lines()]
        return [entry for entry in found if entry["type"] not in ("Started", "Acknowledged")]

    def ends(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries() if entry["type"] == "Ended"]

    def verdict(self) -> Verdict:
        return verify_log([line + b"\n" for line in self.lines()], None)

    def states(self) -> dict[str, str]:
        """Every lease's state or why it ended, by anchor and epoch: for one UE and service."""
        leases = [e["terms"]["lease_id"] for e in self.entries() if e["type"] == "Prepared"]
        return {
            f"{held.terms.anchor}@{held.terms.epoch}": held.end_reason or held.state
            for held in map(self.ledger.lease, leases)
        }

    def reasons(self) -> Counter[str]:
        """How many leases are in which state, or ended for which reason."""
        leases = [e["terms"]["lease_id"] for e in self.entries() if e["type"] == "Prepared"]
        held = map(self.ledger.lease, leases)
        return Counter(str(one.end_reason or one.state) for one in held)

    def slots(self) -> dict[str, int]:
        return {anchor: n for anchor, n in self.ledger.pools.slots_used().items() if n}

    def check_pools(self) -> None:
        """Pools hold exactly what live leases hold, and quotas what sessions do: nothing leaks."""
        slots: Counter[str] = Counter(
            held.terms.anchor for held in self.ledger.live() if held.terms.anchor is not None
        )
        assert self.slots() == slots
        held_by = Counter(session.tenant for session in self.ledger.sessions())
        for tenant in self.controller.tenants:
            assert self.ledger.held_by(tenant).sessions == held_by[tenant]


async def _never(operations: Sequence[Operation]) -> None:
    raise EnforcementError("the process is dead")


def session_id(grant: Grant) -> str:
    return grant.lease.terms.session_id


def lease_id(grant: Grant) -> str:
    return grant.lease.terms.lease_id


def opens(operations: Sequence[Operation]) -> bool:
    """Whether any of these gives somebody something."""
    return any(isinstance(operation, Install | Move | Renew) for operation in operations)


def scenario(**options: Any) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Any]:
    """Run an async test in a world that has these options, with a file as its store."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
        @functools.wraps(test)
        def run(tmp_path: Path, **arguments: Any) -> None:
            with World(tmp_path, **options) as world:
                world.run(test(world, **arguments))

        wanted = inspect.signature(test).parameters
        passed = [p for name, p in wanted.items() if name != "world"]
        path = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([path, *passed])  # type: ignore[attr-defined]
        return run

    return decorate


async def all_of(*work: Awaitable[Any]) -> list[Any]:
    """Do all at once; return what came of each: an answer or an exception."""
    return await asyncio.gather(*work, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    """Let others run until something is so."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came about")


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait for it."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def why(refusal: Refusal) -> dict[str, str]:
    return {exclusion.anchor: exclusion.constraint for exclusion in refusal.excluded}


def granted(outcomes: Sequence[object]) -> list[Grant]:
    assert all(isinstance(one, Grant | Refusal) for one in outcomes), outcomes
    return [one for one in outcomes if isinstance(one, Grant)]


def causes(outcomes: Sequence[object]) -> Counter[str]:
    return Counter(one.cause for one in outcomes if isinstance(one, Refusal))


def moves(world: World) -> int:
    """Return how often a session was moved."""
    return sum(isinstance(batch[0], Move) for batch in world.enforcer.applied)
