"""A control plane in one process: real journal, fake time, fake user plane, fake anchors."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controlplane.catalogue import Catalogue
from controlplane.clock import NS_PER_MS
from controlplane.configfile import parse_yaml
from controlplane.controller import Controller, Settings, Subscriber
from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Flow,
    Install,
    Move,
    Operation,
    Reconciliation,
    Renew,
    Revoke,
    StaleEpochError,
    Usage,
)
from controlplane.evidence import Journal
from controlplane.lease import Event
from controlplane.ledger import Ledger

KEY = Ed25519PrivateKey.generate()
PREPARE_MS, DRAIN_MS = 2_000, 100
CATALOGUE = """
qos_profiles: [{name: QOS_E, guaranteed_share: 0.5}, {name: BEST_EFFORT}]
services:
  - {aisi: chat, task: text-generation, model: tokens-1,
     address4: 198.18.0.1, address6: "fd00:a151::1", port: 8000}
  - {aisi: ears, task: automatic-speech-recognition, model: words-1,
     address4: 198.18.0.2, address6: "fd00:a151::2", port: 8001}
anchors:
  - {name: edge1, region: north, trust_tier: 3, slots: 2, cost: 2,
     hosts: [{aisi: chat, service_time_ms: 20}, {aisi: ears, service_time_ms: 20}]}
  - {name: edge2, region: north, trust_tier: 3, slots: 2, cost: 3,
     hosts: [{aisi: chat, service_time_ms: 20}, {aisi: ears, service_time_ms: 20}]}
  - {name: cloud, region: south, trust_tier: 1, slots: 3, cost: 50, path_rtt_ms: 40,
     hosts: [{aisi: chat, service_time_ms: 10}]}
"""
UES = ("ue1", "ue2", "ue3", "ue4")


def catalogue(text: str = CATALOGUE) -> Catalogue:
    return parse_yaml(text, Catalogue, "catalogue.yaml")


def subscribers() -> list[Subscriber]:
    return [
        Subscriber(ue, IPv4Address(f"10.45.0.{n}"), IPv6Address(f"fd00:45::{n}"))
        for n, ue in enumerate(UES, start=1)
    ]


class FakeClock:
    """Has the interface of `controlplane.clock.Clock`; stands still until told."""

    def __init__(self) -> None:
        self.now = 5_000_000_000
        self.offset = 1_760_000_000_123_456_789

    def advance(self, ms: float) -> None:
        self.now += int(ms * NS_PER_MS)

    def now_ns(self) -> int:
        return self.now

    def to_unix_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.offset

    def from_unix_ns(self, unix_ns: int) -> int:
        return unix_ns - self.offset


class FakeEnforcer:
    """A user plane that keeps its promises as the kernel does: by flow, atomic, with deadlines.

    Like the kernel it survives the controller. `refuse` is asked about each batch. Each applied
    batch is entered in `applied` and `trace`.
    """

    def __init__(self, clock: FakeClock, trace: list[str]) -> None:
        self._clock = clock
        self._trace = trace
        self._steer: dict[Flow, Binding] = {}
        self._drain: dict[Flow, dict[str, int]] = {}  # lease -> until
        self._epoch: dict[Flow, int] = {}
        self.applied: list[tuple[Operation, ...]] = []
        self.refuse: Callable[[Sequence[Operation]], bool] = lambda operations: False
        self.before: Callable[[Sequence[Operation]], None] = lambda operations: None

    # What a test looks at: lease -> deadline, of those that still run

    def steering(self) -> dict[str, int]:
        live = [b for b in self._steer.values() if b.expires_ns > self._clock.now]
        assert all(self._steer.get(flow) == b for b in live for flow in b.flows), "half a lease"
        return {binding.lease_id: binding.expires_ns for binding in live}

    def anchors(self) -> dict[str, str]:
        """Which anchor each UE address is steered to, by `ue>service`."""
        return {
            f"{flow.ue}>{flow.service}": binding.anchor
            for flow, binding in self._steer.items()
            if binding.expires_ns > self._clock.now
        }

    def drains(self) -> dict[str, int]:
        return {
            lease_id: until
            for drains in self._drain.values()
            for lease_id, until in drains.items()
            if until > self._clock.now
        }

    def epochs(self) -> dict[Flow, int]:
        return dict(self._epoch)

    # Enforcer

    def apply(self, operations: Sequence[Operation]) -> None:
        if not operations:
            return
        self.before(operations)
        if self.refuse(operations):
            self._trace.append("refused")
            raise EnforcementError("the kernel said no")
        kept = dict(self._steer), {f: dict(d) for f, d in self._drain.items()}, dict(self._epoch)
        try:
            for operation in operations:
                self._one(operation)
        except EnforcementError:
            self._steer, self._drain, self._epoch = kept
            raise
        self.applied.append(tuple(operations))
        self._trace.append("+".join(type(operation).__name__ for operation in operations))

    def enforced(self) -> list[Enforced]:
        return [
            Enforced(
                lease_id=binding.lease_id,
                epoch=binding.epoch,
                flow=flow,
                anchor=binding.anchor,
                remaining_ms=(binding.expires_ns - self._clock.now) // NS_PER_MS,
                usage=Usage(
                    uplink_packets=1, uplink_bytes=64, downlink_packets=2, downlink_bytes=128
                ),
            )
            for flow, binding in self._steer.items()
            if binding.expires_ns > self._clock.now
        ]

    def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        wanted: dict[Flow, Binding] = {}
        for binding in live:
            for flow in binding.flows:
                assert flow not in wanted, f"two leases for {flow}"
                assert binding.epoch >= self._epoch.get(flow, 0), "an epoch went back"
                wanted[flow] = binding
                self._epoch[flow] = binding.epoch
        before = {b.lease_id for b in self._steer.values() if b.expires_ns > self._clock.now}
        after = {b.lease_id for b in wanted.values()}
        self._steer = wanted
        self._drain = {flow: drains for flow, drains in self._drain.items() if flow in wanted}
        self._trace.append("reconcile")
        return Reconciliation(
            adopted=tuple(sorted(before & after)),
            installed=tuple(sorted(after - before)),
            removed=tuple(sorted(before - after)),
        )

    def drops(self) -> dict[str, int]:
        return {"no_lease_uplink": 3}

    def _one(self, operation: Operation) -> None:
        match operation:
            case Install(new) | Move(new, _, _):
                for flow in new.flows:
                    self._fence(new, flow, at_least=self._epoch.get(flow, 0) + 1)
                    assert new.expires_ns > self._clock.now, "opened for a lease that is over"
                    if isinstance(operation, Move):
                        assert self._steer[flow] == operation.old, "moved from where it was not"
                        assert operation.drain_until_ns <= operation.old.expires_ns
                        drains = self._drain.setdefault(flow, {})
                        drains[operation.old.lease_id] = operation.drain_until_ns
                    self._steer[flow] = new
                    self._epoch[flow] = new.epoch
            case Renew(new):
                for flow in new.flows:
                    self._fence(new, flow, at_least=self._epoch.get(flow, 0))
                    assert self._steer[flow].lease_id == new.lease_id
                    self._steer[flow] = new
            case Revoke(binding):
                for flow in binding.flows:
                    self._fence(binding, flow, at_least=self._epoch.get(flow, 0))
                    self._steer.pop(flow, None)
                    self._drain.pop(flow, None)
            case EndDrain(old):
                for flow in old.flows:
                    self._drain.get(flow, {}).pop(old.lease_id, None)

    def _fence(self, binding: Binding, flow: Flow, *, at_least: int) -> None:
        if binding.epoch < at_least:
            raise StaleEpochError(f"epoch {binding.epoch}, the kernel is at {at_least}")


class FakeGateway:
    """Anchors that are ready unless told otherwise; `meanwhile` happens while one is asked."""

    def __init__(self, trace: list[str]) -> None:
        self._trace = trace
        self.unready: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.meanwhile: Callable[[], Awaitable[None] | None] = lambda: None

    async def ready(self, anchor: str, aisi: str) -> bool:
        self.asked.append((anchor, aisi))
        self._trace.append(f"ask {anchor}")
        await asyncio.sleep(0)  # other transactions get their turn here
        happening = self.meanwhile()
        if happening is not None:
            await happening
        return anchor not in self.unready


class SpyJournal(Journal):
    """The real journal; enters each write in `trace` once it is durable."""

    trace: list[str]

    def append(self, events: Sequence[Event]) -> None:
        super().append(events)
        self.trace.append("journal " + "+".join(type(event).__name__ for event in events))


class World:
    """A controller and all around it. The kernel and the clock outlive the controller."""

    def __init__(
        self,
        folder: Path,
        *,
        catalogue_text: str = CATALOGUE,
        settings: Settings | None = None,
        start: bool = True,
    ) -> None:
        self.path = folder / "journal"
        self.trace: list[str] = []
        self.clock = FakeClock()
        self.catalogue = catalogue(catalogue_text)
        self.settings = settings or Settings(prepare_ms=PREPARE_MS, drain_ms=DRAIN_MS)
        self.gateway = FakeGateway(self.trace)
        self.enforcer = FakeEnforcer(self.clock, self.trace)
        if start:
            self.start()

    def start(self) -> None:
        self.journal = SpyJournal(self.path, self.clock)
        self.journal.trace = self.trace
        try:
            self.ledger = Ledger(self.journal)
            self.controller = Controller(
                catalogue=self.catalogue,
                subscribers=subscribers(),
                ledger=self.ledger,
                enforcer=self.enforcer,
                gateway=self.gateway,
                key=KEY,
                clock=self.clock,
                settings=self.settings,
            )
            self.controller.recover()
        except BaseException:
            self.journal.close()
            raise

    def restart(self) -> None:
        """Crash and come up again."""
        self.journal.close()
        self.start()

    def close(self) -> None:
        self.journal.close()

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def states(self) -> dict[str, str]:
        """Every lease's state or why it ended, by anchor and epoch."""
        return {
            f"{held.terms.anchor}@{held.terms.epoch}": held.end_reason or held.state
            for held in map(self.ledger.lease, self.lease_ids())
        }

    def lease_ids(self) -> list[str]:
        return [e["terms"]["lease_id"] for e in self.entries() if e["type"] == "Prepared"]

    def slots(self) -> dict[str, int]:
        return {anchor: used for anchor, used in self.ledger.slots_used().items() if used}
