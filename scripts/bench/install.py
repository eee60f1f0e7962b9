"""`aipaging bench install`: what it costs to put one COMMIT into the kernel, by each way there is.

Every round takes every measurement once, in random order, in a namespace without and in one with
other live leases: what disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import gc
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from controlplane.enforcement import Binding, Flow, Install, Move, Operation, Renew, Revoke
from scripts.bench import common
from scripts.bench.installers import (
    CommandLineInstaller,
    Installer,
    PackedInstaller,
    Pyroute2Installer,
    commit_elements,
    grouped,
)
from scripts.errors import require_root
from upf.config import AnchorPort, GateConfig
from upf.elements import Add, Delete, encode_batch
from upf.features import probe
from upf.gate import Gate
from upf.netns import Namespace
from upf.readback import Element, read_element

METHOD = """\
Each figure is the wall time, in microseconds, of one call in this process that ends when the
kernel has acknowledged. One COMMIT of one family is three elements (steer, return, qos) with
timeout and comment; dual-stack, six. packed: upf.nft_socket.NftSocket.commit, from elements to
acknowledgement. encode: the part of it that makes the bytes. gate:
upf.gate.Gate.apply([Install]), with fencing and the flow's state. pyroute2: the same elements in
pyroute2's message classes through AsyncNFTables.nlm_request_batch, in an event loop inside the
namespace. nft_cli: `nft -f -`, with the start of the process. Batches: many leases in one
transaction, sorted by set, per element. All are interleaved in random order within each round, in
turns of a few calls; garbage collection is off meanwhile."""

UE = "10.45.0.1", "fd00:45::1"
FIRST_SERVICE = ip_address("198.18.0.1"), ip_address("fd00:a151::1")
TURN_CALLS = 5
SLOW_SHARE = 10  # batches and the command line are taken once in so many rounds
BATCH_LEASES = 1_000
ONE_HOUR_NS = 3600 * 1_000_000_000
CONFIG = GateConfig(
    n3_interfaces=("n3",),
    anchors=tuple(
        AnchorPort(
            name=f"edge{number}",
            interface=f"n6-{number}",
            address4=ip_address(f"10.99.{number}.1"),  # type: ignore[arg-type]
            address6=ip_address(f"fd00:99:{number}::1"),  # type: ignore[arg-type]
        )
        for number in (1, 2)
    ),
    attachments=(),
    qos_classes={"bench": 0x0001_0010},
)


def binding(number: int, versions: tuple[int, ...], *, epoch: int = 1, anchor: int = 1) -> Binding:
    """Return the binding of lease `number`, an hour long."""
    flows = tuple(
        Flow(ip_address(UE[version == 6]), FIRST_SERVICE[version == 6] + number)
        for version in versions
    )
    return Binding(
        lease_id=f"bench-{number:08d}",
        epoch=epoch,
        flows=flows,
        anchor=f"edge{anchor}",
        qos_profile="bench",
        expires_ns=time.monotonic_ns() + ONE_HOUR_NS,
    )


class Bench:
    """One namespace with the gate's table, `live` other leases, and every way to add one more."""

    def __init__(self, live: int, batch_leases: int, undo: ExitStack) -> None:
        namespace = undo.enter_context(Namespace())
        self.gate = Gate(namespace.path, CONFIG, in_place_renewal=probe().in_place_renewal)
        undo.callback(self.gate.close)
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
        for number in range(live):
            self.gate.apply([Install(binding(number, (4,)))])
        self._check()

    def measurements(self) -> dict[str, Callable[[], dict[str, float]]]:
        """Return name -> a function that measures once: figure -> microseconds."""
        found: dict[str, Callable[[], dict[str, float]]] = {
            "gate": lambda: self._gate("gate", (4,)),
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
            "packed_batch": lambda: self._batch("packed"),
            "pyroute2_batch": lambda: self._batch("pyroute2"),
        }
        if "nft_cli" in self.installers:
            found["nft_cli"] = lambda: self._one("nft_cli")
        return found

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _elements(self, versions: tuple[int, ...] = (4,)) -> list[Add]:
        number = self._next()
        return [
            add
            for version in versions
            for add in commit_elements(
                CONFIG,
                UE[version == 6],
                FIRST_SERVICE[version == 6] + number,
                f"bench-{number:08d} 1",
            )
        ]

    def _remove(self, elements: list[Add]) -> None:
        self.packed.socket.commit([Delete(add.set_name, add.key) for add in elements])

    def _one(self, way: str, versions: tuple[int, ...] = (4,)) -> dict[str, float]:
        elements = self._elements(versions)
        took_ns = self.installers[way].install(elements)
        self._remove(elements)
        suffix = "_dual_stack" if len(versions) > 1 else ""
        return {f"{way}{suffix}_us": took_ns / 1e3}

    def _batch(self, way: str) -> dict[str, float]:
        elements = [add for _ in range(self._batch_leases) for add in self._elements()]
        in_order = [add for _, adds in grouped(elements) for add in adds]
        took_ns = self.installers[way].install(in_order)
        self._remove(elements)
        return {f"{way}_batch_us_per_element": took_ns / 1e3 / len(elements)}

    def _encode(self) -> dict[str, float]:
        elements = self._elements()
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

    def _life(self) -> dict[str, float]:
        number = self._next()
        first, moved = binding(number, (4,)), binding(number, (4,), epoch=2, anchor=2)
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
        wanted = [
            add
            for flow, ue in zip(lease.flows, UE, strict=True)
            for add in commit_elements(CONFIG, ue, flow.service, f"{lease.lease_id} 1")
        ]
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


def measure(
    *, live: list[int], rounds: int, seed: int, batch_leases: int = BATCH_LEASES
) -> dict[str, Any]:
    """Measure with each number of live leases; return the figures.

    The first number's figures stand at the top, all of them under `by_live_leases`.
    """
    order = random.Random(seed)
    samples: dict[int, dict[str, list[float]]] = {count: defaultdict(list) for count in live}
    with ExitStack() as undo:
        benches = {count: Bench(count, batch_leases, undo) for count in live}
        command_line = all("nft_cli" in bench.installers for bench in benches.values())
        if not command_line:
            common.console.print("nft_cli: skipped, there is no nft command on this machine")
        for bench in benches.values():  # not counted: warm caches, grown tables
            for take in (bench.measurements() | bench.slow_measurements()).values():
                take()
        for number in common.steps("install", rounds):
            todo = [
                (count, take, calls)
                for count, bench in benches.items()
                for found, calls in (
                    (bench.measurements(), TURN_CALLS),
                    (bench.slow_measurements() if number % SLOW_SHARE == 0 else {}, 1),
                )
                for take in found.values()
            ]
            order.shuffle(todo)
            gc.collect()
            gc.disable()
            try:
                for count, take, calls in todo:
                    for _ in range(calls):
                        for name, value in take().items():
                            samples[count][name].append(value)
            finally:
                gc.enable()
    by_live = {
        str(count): {name: common.quantiles(values) for name, values in sorted(found.items())}
        for count, found in samples.items()
    }
    figures: dict[str, Any] = dict(by_live[str(live[0])])
    figures["ratios"] = _ratios(figures)
    figures["by_live_leases"] = by_live
    figures["elements_per_commit"] = {"single_family": 3, "dual_stack": 6}
    figures["nft_cli"] = "measured" if command_line else "skipped: no nft command"
    figures["method"] = METHOD
    return figures


def _ratios(figures: dict[str, Any]) -> dict[str, float]:
    pairs = {
        "gate_to_packed": ("gate_us", "packed_us"),
        "pyroute2_to_packed": ("pyroute2_us", "packed_us"),
        "nft_cli_to_packed": ("nft_cli_us", "packed_us"),
        "pyroute2_to_packed_batch": (
            "pyroute2_batch_us_per_element",
            "packed_batch_us_per_element",
        ),
    }
    return {
        name: figures[above]["p50"] / figures[below]["p50"]
        for name, (above, below) in pairs.items()
        if above in figures
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    rows = [
        (name, live, *(f"{values[q]:,.1f}" for q in common.QUANTILES), str(values["count"]))
        for live, found in figures["by_live_leases"].items()
        for name, values in found.items()
    ]
    columns = ("figure (µs)", "live leases", *common.QUANTILES, "count")
    common.print_table("One COMMIT into the kernel", columns, rows, figures["nft_cli"])


@click.command()
@click.option(
    "--json",
    "path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the figures go.",
)
@click.option(
    "--leases",
    default=10_000,
    show_default=True,
    type=click.IntRange(1, 130_000 - BATCH_LEASES),
    help="Other live leases in the second namespace; the first has none. 100000 takes some 10 s.",
)
@click.option("--rounds", default=300, show_default=True, type=click.IntRange(2, 5_000))
@click.option("--seed", default=1, show_default=True, help="Of the order within each round.")
def command(path: Path, leases: int, rounds: int, seed: int) -> None:
    """Time one COMMIT into the kernel: our packed message, pyroute2's own call, the nft command.

    Works in network namespaces of its own, which vanish with it; a minute with the defaults.

    \b
    Example:
      aipaging bench install --json results/install.json

    In the file, times are microseconds: packed_us.p50 is the median of the bare message of one
    COMMIT, gate_us.p50 that of the whole Gate.apply; pyroute2_us, nft_cli_us and
    packed_batch_us_per_element stand beside them. docs/performance.md explains every key.
    """
    require_root("a benchmark of the kernel")
    figures = measure(live=[0, leases], rounds=rounds, seed=seed)
    show(figures)
    options = {"leases": leases, "rounds": rounds, "batch_leases": BATCH_LEASES}
    common.write_result(path, benchmark="install", seed=seed, options=options, figures=figures)
