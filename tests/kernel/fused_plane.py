"""A control plane with real store and gate that kills itself at a chosen step."""

import asyncio
import os
import signal
import time
from contextlib import ExitStack, closing
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any
from unittest.mock import patch

from controlplane.admission import Rates
from controlplane.catalogue import Catalogue
from controlplane.clock import Clock
from controlplane.controller import Settings
from controlplane.keys import KeyRing, generate_key, load_private_key
from controlplane.parties import Subscriber
from controlplane.policy import Tenants
from controlplane.service import Network, Options, Service
from controlplane.sqlite_outbox import SqliteOutbox
from controlplane.sqlite_store import SqliteStore
from controlplane.store import Write
from upf.config import AnchorPort, Attachment, GateConfig
from upf.fastpath import tag_of
from upf.features import probe
from upf.gate import Gate
from upf.local import LocalUserPlane

UES = 24
TASK = "text-generation"
ANCHORS = ("edge1", "edge2")

CATALOGUE = Catalogue.model_validate(
    {
        "qos_profiles": [{"name": "QOS_E", "five_qi": 80}],
        "services": [
            {
                **{"aisi": "chat", "task": TASK, "model": "m"},
                **{"address4": "198.18.0.1", "address6": "fd00:a151::1"},
            }
        ],
        "anchors": [
            {
                **{"name": name, "region": "n", "trust_tier": 3, "slots": 1000, "cost": 1.0},
                "hosts": [{"aisi": "chat", "service_time_ms": 1.0}],
            }
            for name in ANCHORS
        ],
    }
)
GATE = GateConfig(
    n3_interfaces=("n3",),
    anchors=tuple(
        AnchorPort(
            name=name,
            interface=f"n6-{number}",
            address4=IPv4Address(f"10.47.{number}.2"),
            address6=IPv6Address(f"fd00:47:{number}::2"),
        )
        for number, name in enumerate(ANCHORS, start=1)
    ),
    attachments=tuple(
        Attachment("n3", ue(n))
        for n in range(1, UES + 1)
        for ue in (lambda n: IPv4Address(f"10.45.0.{n}"), lambda n: IPv6Address(f"fd00:45::{n:x}"))
    ),
)
SUBSCRIBERS = [
    Subscriber(f"ue{n}", IPv4Address(f"10.45.0.{n}"), IPv6Address(f"fd00:45::{n:x}"), "gnb1")
    for n in range(1, UES + 1)
]


class Ready:
    """Anchors that are asked, and ready: preparations are durable meanwhile."""

    async def ready(self, anchor: str, aisi: str) -> bool:
        await asyncio.sleep(0)
        return True


class Fuse:
    """Kills this process the nth time that `at` names its point."""

    def __init__(self, point: str, times: int) -> None:
        self._point = point
        self._left = times

    def at(self, point: str) -> None:
        if point == self._point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class FusedStore(SqliteStore):
    """The store, with the fuse at its steps."""

    fuse: Fuse

    def write(self, write: Write) -> None:
        self.fuse.at("before write")
        if LAZY and len(write.lines) > 1:
            # The negative control: it says that the end of a write is durable, and it is not.
            kept = self._size + len(write.lines)
            super().write(Write(write.lines[:1], write.notices, write.sinks))
            self._size = kept
            return
        self.connection.set_trace_callback(self._traced)
        super().write(write)
        self.fuse.at("after write")

    def _traced(self, statement: str) -> None:
        if statement.startswith("INSERT"):
            self.fuse.at("in transaction")
        elif statement.startswith("COMMIT"):
            self.fuse.at("before commit")


class FusedPlane(LocalUserPlane):
    """The user plane, with the fuse around it."""

    fuse: Fuse

    async def apply(self, operations: Any) -> None:
        self.fuse.at("before kernel")
        await super().apply(operations)
        self.fuse.at("after kernel")


def service(folder: Path, netns: str, undo: ExitStack, fuse: Fuse) -> Service:
    """Put a control plane together over what is left of the one before."""
    features = probe_once()
    gate = Gate(netns, GATE, in_place_renewal=features.in_place_renewal, fast_path=features.tc_bpf)
    undo.enter_context(closing(gate))
    change = gate._timed.change

    def fused(*arguments: Any) -> None:
        fuse.at("before gate")
        change(*arguments)
        fuse.at("after gate")

    undo.enter_context(patch.object(gate._timed, "change", fused))
    store = undo.enter_context(closing(FusedStore(folder / "control.db")))
    plane = FusedPlane(gate)
    store.fuse = plane.fuse = fuse
    key = folder / "evidence.key"
    return Service(
        catalogue=CATALOGUE,
        network=Network(
            subscribers=SUBSCRIBERS,
            cells={"gnb1": Rates(None, None)},
            attachment_points=ANCHORS,
            anchor_addresses={},
        ),
        tenants=Tenants(),
        store=store,
        outbox=SqliteOutbox(store),
        keys=KeyRing.open(folder / "keys", time.time_ns()),
        evidence_key=load_private_key(key) if key.exists() else generate_key(key),
        enforcer=plane,
        gateway=Ready(),
        clock=Clock(),
        options=Options(settings=Settings(drain_ms=500)),
    )


FEATURES: list[Any] = []
LAZY: list[bool] = []  # not empty: the store lies


def probe_once() -> Any:
    if not FEATURES:
        FEATURES.append(probe())
    return FEATURES[0]


def gate_of(made: Service) -> Gate:
    enforcer = made.plane.controller.enforcer
    assert isinstance(enforcer, FusedPlane)
    return enforcer._gate


def fast_of(gate: Gate) -> tuple[list[int], list[int]]:
    """Return of which leases the fast path has uplink entries, and of which it should."""
    fast_path, leases = gate._fast, gate.enforced()
    if fast_path is None:
        return [], []
    tags = [entry.tag for name in ("up4", "up6") for _, entry in fast_path.entries(name)]
    wanted = [tag_of(f"{entry.lease_id} {entry.epoch}".encode()) for entry in leases]
    return sorted(tags), sorted(wanted)
