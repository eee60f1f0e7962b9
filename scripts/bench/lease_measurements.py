"""What is measured of leases in the kernel: one namespace, and everything timed in it once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address

from controlplane.enforcement import Binding, Flow, Install, Move, Operation, Renew, Revoke
from scripts.bench.apart import GateApart
from scripts.bench.chain import QOS, Chain, edge, gate_config, install
from scripts.bench.installers import (
    CommandLineInstaller,
    Installer,
    PackedInstaller,
    Pyroute2Installer,
    commit_elements,
    grouped,
)
from upf.answers import Element
from upf.config import GateConfig
from upf.elements import Add, Delete, encode_batch
from upf.features import Features
from upf.flows import LeaseElements
from upf.lease_classes import LeaseClasses
from upf.readback import read_element

UE = "10.45.0.1", "fd00:45::1"
FIRST_SERVICE = ip_address("198.18.0.1"), ip_address("fd00:a151::1")
ONE_HOUR_NS = 3600 * 1_000_000_000
ANCHORS = 2


def binding(number: int, versions: tuple[int, ...], *, epoch: int = 1, anchor: int = 0) -> Binding:
    """Return the binding of lease `number`, an hour long."""
    flows = tuple(
        Flow(ip_address(UE[version == 6]), FIRST_SERVICE[version == 6] + number)
        for version in versions
    )
    return Binding(
        lease_id=f"bench-{number:08d}",
        epoch=epoch,
        flows=flows,
        anchor=edge(anchor),
        qos=QOS,
        expires_ns=time.monotonic_ns() + ONE_HOUR_NS,
    )


def config() -> GateConfig:
    """Return the gate's configuration, as the chain has it."""
    return gate_config(ANCHORS, map(ip_address, UE))


class LeaseMeasurements:
    """One namespace with the gate's table, `live` other leases, and every way to add one more."""

    def __init__(self, live: int, batch_leases: int, features: Features, undo: ExitStack) -> None:
        chain = Chain(leases=1, anchors=ANCHORS, features=features)
        undo.callback(chain.close)
        assert chain.gate is not None
        self.gate, namespace = chain.gate, chain.upf
        self._lease_elements = LeaseElements(config(), LeaseClasses((), {}).class_of)
        self.elements_per_commit = len(self._elements(0))
        self.entries_per_commit = 2 if features.tc_bpf else 0  # of the fast path: up, down
        self.packed = PackedInstaller(namespace.path)
        self.installers: dict[str, Installer] = {
            "packed": self.packed,
            "pyroute2": Pyroute2Installer(namespace.path),
        }
        nft = shutil.which("nft")
        if nft is not None:
            self.installers["nft_cli"] = CommandLineInstaller(namespace.path, nft)
        for installer in self.installers.values():
            undo.callback(installer.close)
        self._batch_leases = batch_leases
        self._number = live
        install(self.gate, [binding(number, (4,)) for number in range(live)])
        self._check()
        self._apart = GateApart(namespace.path, undo)

    def measurements(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Return name -> a function that measures once: figure -> microseconds."""
        found: dict[str, Callable[[], dict[str, float]]] = {
            "gate": lambda: self._gate("gate", (4,)),
            "socket": self._socket,
            "gate_dual_stack": lambda: self._gate("gate_dual_stack", (4, 6)),
            "life": self._life,
            "packed": lambda: self._one("packed"),
            "packed_dual_stack": lambda: self._one("packed", versions=(4, 6)),
            "encode": self._encode,
            "pyroute2": lambda: self._one("pyroute2"),
        }
        return found

    def slow_measurements(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Return those that take many milliseconds."""
        found: dict[str, Callable[[], dict[str, float]]] = {
            "gate_batch": self._gate_batch,
            "packed_batch": lambda: self._batch("packed"),
            "pyroute2_batch": lambda: self._batch("pyroute2"),
        }
        if "nft_cli" in self.installers:
            found["nft_cli"] = lambda: self._one("nft_cli")
        return found

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _elements(self, number: int, versions: tuple[int, ...] = (4,)) -> list[Add]:
        return commit_elements(self._lease_elements, binding(number, versions))

    def _remove(self, elements: list[Add]) -> None:
        self.packed.socket.commit([Delete(add.set_name, add.key) for add in elements])

    def _one(self, way: str, versions: tuple[int, ...] = (4,)) -> dict[str, float]:
        elements = self._elements(self._next(), versions)
        took_ns = self.installers[way].install(elements)
        self._remove(elements)
        suffix = "_dual_stack" if len(versions) > 1 else ""
        return {f"{way}{suffix}_us": took_ns / 1e3}

    def _batch(self, way: str) -> dict[str, float]:
        elements = [add for _ in range(self._batch_leases) for add in self._elements(self._next())]
        in_order = [add for _, adds in grouped(elements) for add in adds]
        took_ns = self.installers[way].install(in_order)
        self._remove(elements)
        return {f"{way}_batch_us_per_element": took_ns / 1e3 / len(elements)}

    def _gate_batch(self) -> dict[str, float]:
        leases = [binding(self._next(), (4,)) for _ in range(self._batch_leases)]
        installs: list[Operation] = [Install(lease) for lease in leases]
        begin_ns = time.perf_counter_ns()
        self.gate.apply(installs)
        took_ns = time.perf_counter_ns() - begin_ns
        self.gate.apply([Revoke(lease) for lease in leases])
        elements = len(leases) * (self.elements_per_commit + self.entries_per_commit)
        return {"gate_batch_us_per_element": took_ns / 1e3 / elements}

    def _encode(self) -> dict[str, float]:
        elements = self._elements(self._next())
        begin_ns = time.perf_counter_ns()
        encode_batch(elements, 1)
        return {"encode_us": (time.perf_counter_ns() - begin_ns) / 1e3}

    def _apply(self, operation: Operation) -> float:
        begin_ns = time.perf_counter_ns()
        self.gate.apply([operation])
        return (time.perf_counter_ns() - begin_ns) / 1e3

    def _gate(self, name: str, versions: tuple[int, ...]) -> dict[str, float]:
        lease = binding(self._next(), versions)
        took_us = self._apply(Install(lease))
        self.gate.apply([Revoke(lease)])
        return {f"{name}_us": took_us}

    def _socket(self) -> dict[str, float]:
        lease = binding(self._next(), (4,))
        took_us = self._apart.apply(Install(lease))
        self._apart.apply(Revoke(lease))
        return {"socket_us": took_us}

    def _life(self) -> dict[str, float]:
        number = self._next()
        first, moved = binding(number, (4,)), binding(number, (4,), epoch=2, anchor=1)
        self.gate.apply([Install(first)])
        longer = replace(first, expires_ns=first.expires_ns + ONE_HOUR_NS)
        drain_until_ns = time.monotonic_ns() + 1_000_000_000
        return {
            "renew_us": self._apply(Renew(longer)),
            "move_us": self._apply(Move(moved, longer, drain_until_ns)),
            "revoke_us": self._apply(Revoke(moved)),
        }

    def _check(self) -> None:
        """Make sure that every way, and the gate, put the same into the kernel."""
        lease = binding(self._next(), (4, 6))
        self.gate.apply([Install(lease)])
        wanted = commit_elements(self._lease_elements, lease)
        by_gate = [self._held(add) for add in wanted]
        self.gate.apply([Revoke(lease)])
        for name, installer in self.installers.items():
            installer.install(wanted)
            if [self._held(add) for add in wanted] != by_gate:
                raise AssertionError(f"{name} and the gate installed different elements")
            self._remove(wanted)

    def _held(self, add: Add) -> Element:
        found = read_element(self.packed.socket, add.set_name, add.key)
        if found is None:
            raise AssertionError(f"no element of {add.set_name} after it was installed")
        return replace(found, remaining_ms=0)
