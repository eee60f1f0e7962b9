"""A control plane to be killed: each life is a process, with clients that hammer it.

This program is told lives, one JSON object a line, and forks a process for each, so that none has
to import anything. A life ends by SIGKILL: by its own hand at a step, or from outside after a
while. What outlives it is in its folder: the store, the user plane (`kernel`), and `heard`, where
clients note what they ask and what they are answered.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes import UES, subscribers

from controlplane.admission import Rates
from controlplane.answers import Refusal
from controlplane.catalogue import Catalogue
from controlplane.clock import Clock
from controlplane.configfile import parse_yaml
from controlplane.controller import Settings
from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Install,
    Move,
    Operation,
    Reconciliation,
    Renew,
    Revoke,
    Usage,
)
from controlplane.fleet import Heartbeat
from controlplane.granting import SinkRequest
from controlplane.intent import Intent
from controlplane.keys import KeyRing
from controlplane.lease import State
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import Page
from controlplane.policy import Tenants
from controlplane.service import Network, Options, Service
from controlplane.sqlite_outbox import SqliteOutbox
from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError, Write

CATALOGUE = """
qos_profiles: [{name: QOS_E}]
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 6, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 6, cost: 1,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""
STEPS = (
    "before the write",
    "after BEGIN",
    "before COMMIT",
    "after COMMIT",
    "before the kernel",
    "after the kernel",
    "before the answer",
    "before an acknowledgement",
    "before reconciling",
    "after reconciling",
)
SINK = SinkRequest(uri="http://127.0.0.1:9/notices", credential=None)  # nobody is there
USAGE = Usage(uplink_packets=1, uplink_bytes=64, downlink_packets=2, downlink_bytes=128)


@dataclass(frozen=True, slots=True)
class Fate:
    """Where a life ends by its own hand: at the nth time that it comes to a step."""

    folder: Path
    step: str | None
    nth: int
    passed: list[str] = field(default_factory=list)

    def at(self, step: str) -> None:
        if step != self.step:
            return
        self.passed.append(step)
        if len(self.passed) == self.nth:
            note(self.folder, {"killed": step})
            os.kill(os.getpid(), signal.SIGKILL)


def note(folder: Path, what: dict[str, Any]) -> None:
    """One write, that is whole or not at all, and there for whoever looks once it returns."""
    file = os.open(folder / "heard", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, json.dumps(what).encode() + b"\n")
    os.close(file)


class MortalStore(SqliteStore):
    """The store, with the steps of a write."""

    def __init__(self, path: Path, fate: Fate) -> None:
        super().__init__(path)
        self._fate = fate
        self.connection.set_trace_callback(self._statement)

    async def append(self, write: Write) -> None:
        self._fate.at("before the write")
        if write.lines and all(b'"type":"Acknowledged"' in line for line in write.lines):
            self._fate.at("before an acknowledgement")
        await super().append(write)
        self._fate.at("after COMMIT")

    def _statement(self, sql: str) -> None:
        if sql.startswith("INSERT INTO entries"):
            self._fate.at("after BEGIN")
        elif sql == "COMMIT":
            self._fate.at("before COMMIT")


class LastingUserPlane:
    """Lives in a file, as the kernel lives on: whole batches or nothing, and with deadlines."""

    def __init__(self, path: Path, fate: Fate) -> None:
        self._path = path
        self._fate = fate
        self.held: dict[str, dict[str, Any]] = read_kernel(path)  # by UE

    async def apply(self, operations: Sequence[Operation]) -> None:
        self._fate.at("before the kernel")
        after = dict(self.held)
        for operation in operations:
            match operation:
                case Install(new) | Move(new, _, _) | Renew(new):
                    ue = str(new.flows[0].ue)
                    known = after.get(ue, {"epoch": 0})
                    if new.epoch < known["epoch"] + isinstance(operation, Move):
                        raise EnforcementError(f"epoch {new.epoch} after {known['epoch']}")
                    if new.expires_ns <= time.monotonic_ns():
                        raise EnforcementError("it is over")
                    after[ue] = _element(new)
                case Revoke(old):
                    after.pop(str(old.flows[0].ue), None)
                case EndDrain():
                    pass
        self._keep(after)
        self._fate.at("after the kernel")

    async def enforced(self) -> list[Enforced]:
        return []

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        return {binding.lease_id: USAGE for binding in bindings}

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        self._fate.at("before reconciling")
        wanted = {str(binding.flows[0].ue): _element(binding) for binding in live}
        adopted = [one["lease"] for ue, one in wanted.items() if self.held.get(ue) == one]
        self._keep(wanted)
        self._fate.at("after reconciling")
        return Reconciliation(adopted=tuple(adopted), installed=(), removed=())

    async def drops(self) -> dict[str, int]:
        return {}

    def _keep(self, held: dict[str, dict[str, Any]]) -> None:
        unfinished = self._path.with_suffix(".new")
        unfinished.write_text(json.dumps(held))
        unfinished.replace(self._path)
        self.held = held


def _element(binding: Binding) -> dict[str, Any]:
    return {
        "lease": binding.lease_id,
        "epoch": binding.epoch,
        "anchor": binding.anchor,
        "expires_ns": binding.expires_ns,
    }


def read_kernel(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the user plane holds now, by UE address."""
    held = json.loads(path.read_text()) if path.exists() else {}
    now_ns = time.monotonic_ns()
    return {ue: one for ue, one in held.items() if one["expires_ns"] > now_ns}


class Anchors:
    """Ready, after a moment."""

    async def ready(self, anchor: str, aisi: str) -> bool:
        await asyncio.sleep(0)
        return True


@contextlib.asynccontextmanager
async def running(folder: Path, fate: Fate) -> AsyncIterator[tuple[ControlPlane, Any]]:
    """The real control plane over this folder."""
    store = MortalStore(folder / "control.db", fate)
    kernel = LastingUserPlane(folder / "kernel", fate)
    service = Service(
        catalogue=parse_yaml(CATALOGUE, Catalogue, "catalogue.yaml"),
        network=Network(
            subscribers=subscribers(),
            cells={"gnb1": Rates()},
            attachment_points=["edge1", "edge2"],
            anchor_addresses={},
        ),
        tenants=Tenants(),
        store=store,
        outbox=SqliteOutbox(store),
        keys=KeyRing.open(folder / "keys", time.time_ns()),
        evidence_key=Ed25519PrivateKey.generate(),
        enforcer=kernel,
        gateway=Anchors(),
        clock=Clock(),
        options=Options(settings=Settings(drain_ms=200)),
    )
    async with service.running() as plane:
        yield plane, kernel
    store.close()


async def live(folder: Path, fate: Fate, seed: int, pause_s: float) -> None:
    """One life: recover, ask again what was not answered, go on until the end."""
    async with running(folder, fate) as (plane, kernel):
        ledger = plane.controller.ledger
        committed = {
            str(held.terms.flows[0].ue): _element(held.binding())
            for held in ledger.live()
            if held.state is State.COMMITTED
        }
        note(folder, {"recovered": kernel.held == committed})
        beating = asyncio.create_task(beat(plane))
        clients = [
            asyncio.create_task(
                Client(folder, fate, plane, ue, random.Random(f"{seed} {ue}"), pause_s).run()
            )
            for ue in UES
        ]
        try:
            await asyncio.gather(*clients)
        finally:
            beating.cancel()


async def beat(plane: ControlPlane) -> None:
    """One anchor says that it is ready: pages there are one write. The other is asked."""
    said = Heartbeat(boot_id="b", load=0.0, ready_aisis=frozenset({"chat"}))
    while True:
        with contextlib.suppress(StoreError):
            await plane.keeper.heartbeat("edge1", said)
        await asyncio.sleep(0.04)


class Client:
    """A UE: it pages, moves, extends and leaves, and notes what it asks and is answered."""

    def __init__(
        self,
        folder: Path,
        fate: Fate,
        plane: ControlPlane,
        ue: str,
        chance: random.Random,
        pause_s: float,
    ) -> None:
        self._folder = folder
        self._fate = fate
        self._plane = plane
        self._ue = ue
        self._chance = chance
        self._pause_s = pause_s
        self._session: str | None = None

    async def run(self) -> None:
        for key in unanswered(self._folder, self._ue):
            await self._page(key)
        sessions = self._plane.controller.ledger.sessions(ue=self._ue)
        self._session = sessions[0].session_id if sessions else None
        while True:
            if self._session is None:
                key = f"{self._ue}-{self._chance.randbytes(6).hex()}"
                note(self._folder, {"asked": "page", "ue": self._ue, "key": key})
                await self._page(key)
            else:
                acts = (self._relocate, self._relocate, self._extend, self._release)
                await self._chance.choice(acts)(self._session)
            await asyncio.sleep(self._chance.random() * self._pause_s)

    async def _page(self, key: str) -> None:
        intent = Intent.model_validate({"task": "text-generation", "durationMs": 60_000})
        page = Page(tenant="default", ue=self._ue, intent=intent, key=key, sink=SINK)
        try:
            grant = await self._plane.pager.page(page)
        except Refusal as refusal:
            self._answered("page", {"key": key, "refused": refusal.cause})
            return
        terms = grant.lease.terms
        self._session = terms.session_id if grant.lease.state is State.COMMITTED else None
        self._answered("page", {"key": key, "session": terms.session_id, "lease": terms.lease_id})

    async def _relocate(self, session: str) -> None:
        with self._may_be_refused():
            grant = await self._plane.relocator.relocate(session)
            self._answered("relocate", {"session": session, "lease": grant.lease.terms.lease_id})

    async def _extend(self, session: str) -> None:
        with self._may_be_refused():
            held = await self._plane.controller.extend(session, 1_000)
            until = self._plane.controller.clock.to_unix_ns(held.deadline_ns)
            lease_id = held.terms.lease_id
            self._answered("extend", {"session": session, "lease": lease_id, "until": until})

    async def _release(self, session: str) -> None:
        with self._may_be_refused():
            await self._plane.controller.release(session)
            self._answered("release", {"session": session})
        self._session = None

    @contextlib.contextmanager
    def _may_be_refused(self) -> Any:
        try:
            yield
        except Refusal as refusal:
            note(self._folder, {"refused": refusal.cause})
            if refusal.cause in ("SESSION_ENDED", "SESSION_UNKNOWN"):
                self._session = None

    def _answered(self, what: str, members: dict[str, Any]) -> None:
        self._fate.at("before the answer")
        note(self._folder, {"answered": what, "ue": self._ue, **members})


def heard(folder: Path) -> list[dict[str, Any]]:
    """Return what clients have noted."""
    path = folder / "heard"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def unanswered(folder: Path, ue: str) -> list[str]:
    """Return the keys of a UE's pages that were never answered."""
    notes = heard(folder)
    asked = [one["key"] for one in notes if one.get("asked") == "page" and one["ue"] == ue]
    answered = {one["key"] for one in notes if one.get("answered") == "page"}
    return [key for key in asked if key not in answered]


def fork(life: Callable[[], None]) -> int:
    """Return the process in which a life is lived."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            life()
            code = 0
        finally:
            os._exit(code)
    return pid


def main() -> None:
    """Live the lives that come on standard input; after each, say how it ended."""
    for line in sys.stdin:
        told = json.loads(line)
        folder = Path(told["folder"])
        fate = Fate(folder, told["step"], told["nth"])

        def life(told: dict[str, Any] = told, folder: Path = folder, fate: Fate = fate) -> None:
            asyncio.run(live(folder, fate, told["seed"], told["pause_s"]))

        pid = fork(life)
        deadline = time.monotonic() + told["life_s"]
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        print(json.dumps({"signal": os.WTERMSIG(status), "code": status}), flush=True)


if __name__ == "__main__":
    main()
