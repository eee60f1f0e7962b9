"""What it costs to put one COMMIT into the kernel, by each way there is.

Every round takes every measurement once, in random order, in a namespace without and in one with
other live leases: what disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

from scripts.bench import common
from scripts.bench.lease_measurements import LeaseMeasurements
from upf.features import Features

METHOD = """\
Each figure is the wall time, in microseconds, of one call in this process that ends when the
kernel has acknowledged. One COMMIT of one family is elements_per_commit elements with timeout and
comment (steer, return, qos); dual-stack, twice as many. packed: upf.nft_socket.NftSocket.commit,
from elements to acknowledgement. encode: the part of it that makes the bytes. gate:
upf.gate.Gate.apply([Install]), with fencing, the flow's state, and where there is a fast path
entries_per_commit entries in the maps of its programs. socket: the same by a gate in a
process of its own, asked over its Unix socket (upf.remote), until its answer is here. pyroute2: the
same elements in pyroute2's message classes through AsyncNFTables.nlm_request_batch, in an event
loop inside the namespace. nft_cli: `nft -f -`, with the start of the process. Batches: many leases
in one transaction, per element (gate_batch: one Gate.apply, per element or entry; else sorted by
set). Live leases, and
those that are installed, are of one family (IPv4) where nothing else is said. All are interleaved
in random order within each round, in turns of a few calls; garbage collection is off meanwhile."""

TURN_CALLS = 5
SLOW_SHARE = 10  # batches and the command line are taken once in so many rounds


def measure(
    *, live: list[int], rounds: int, seed: int, features: Features, batch_leases: int
) -> dict[str, Any]:
    """Measure with each number of live leases; return the figures.

    The first number's figures stand at the top, all of them under `by_live_leases`.
    """
    order = random.Random(seed)
    samples: dict[int, dict[str, list[float]]] = {count: defaultdict(list) for count in live}
    with ExitStack() as undo:
        benches = {count: LeaseMeasurements(count, batch_leases, features, undo) for count in live}
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
    figures["elements_per_commit"] = benches[live[0]].elements_per_commit
    figures["entries_per_commit"] = benches[live[0]].entries_per_commit
    figures["nft_cli"] = "measured" if command_line else "skipped: no nft command"
    figures["method"] = METHOD
    return figures


def _ratios(figures: dict[str, Any]) -> dict[str, float]:
    pairs = {
        "gate_to_packed": ("gate_us", "packed_us"),
        "socket_to_gate": ("socket_us", "gate_us"),
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
    caption = "" if figures["nft_cli"] == "measured" else f"nft_cli {figures['nft_cli']}"
    columns = ("figure (µs)", "live leases", *common.QUANTILES, "count")
    common.print_table("One COMMIT into the kernel", columns, rows, caption)
