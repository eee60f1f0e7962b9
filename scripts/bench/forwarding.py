"""Packets a second through the gate against plain forwarding.

Each round sends one slice through every chain in random order, back to back; a figure is the
median over rounds of the ratio of two slices of the same round.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from scripts.bench import common
from scripts.bench.chain import BEST_EFFORT, QOS, RADIO, Chain, addresses
from scripts.bench.load import Load, Slice
from scripts.errors import UserError
from upf.features import Features

METHOD = """\
UE, UPF and anchor are network namespaces joined by two veth pairs; each arm is a chain of its
own. plain: the UPF has plain routes, and neither an nftables table nor rules for marks.
plain_again: the same once more, the noise floor. steered: the UPF has the real gate (with its fast
path where the kernel can: fast_path), policy routing and the stated number of live leases, each in
both families, all at one anchor or, by UE in turn, at several; best effort, or marked: each of 5QI
80, whose downlink gets a class and a DSCP; load goes through all of them in
turn, slice after slice (the most even product of UEs and services; the other arms see the same
addresses), and that it did is read back from the leases' own counters. Load: UDP by sendmmsg(2) in
batches of 128, pinned to one CPU, on which the kernel also forwards; the generator's own cost is
in every arm, so that ratio is closer to 1 than that of forwarding alone; extra_ns_per_packet is
free of it. Received: counted at the receiving socket, which refuses every datagram, and checked
against the interface's counter. Rate: packets received over the time from the first sent to the
last received. A round takes one slice of every arm in random order; ratio is the median over
rounds of the rate of steered (or plain_again) over that of plain in the same round, with its 95 %
bootstrap interval."""

PAYLOAD_BYTES = 64
PLAIN, AGAIN, STEERED = "plain", "plain_again", "steered"
ARMS = (PLAIN, AGAIN, STEERED)
DIRECTIONS = ("uplink", "downlink")
CASES = tuple((version, direction) for version in (4, 6) for direction in DIRECTIONS)
WARM_UP_NS = 20_000_000
PATH_LIMIT_NS = 10_000_000_000
MAX_LEASES = 100_000


@dataclass(frozen=True, slots=True)
class Size:
    """How many leases a steered arm has, at how many anchors, and whether with a DSCP."""

    leases: int
    anchors: int = 1
    marked: bool = False

    @property
    def name(self) -> str:
        """What its figures are called."""
        name = str(self.leases) if self.anchors == 1 else f"{self.anchors}_anchors"
        return f"{name}_marked" if self.marked else name


class Loads:
    """The prepared loads of one arm at one number of leases, by case."""

    def __init__(self, chain: Chain, leases: int, undo: ExitStack) -> None:
        self._loads: dict[tuple[int, str], Load] = {}
        for version, direction in CASES:
            ues, services = addresses(leases, version)
            if direction == "uplink":
                load = Load(chain.ue, chain.anchor, chain.n6, ues, services, PAYLOAD_BYTES)
            else:
                load = Load(chain.anchor, chain.ue, (RADIO,), services, ues, PAYLOAD_BYTES)
            undo.callback(load.close)
            self._loads[version, direction] = load

    def warm_up(self) -> None:
        """Send until every case has a path, then once through all leases.

        Neighbours must be found, IPv6 addresses settle.
        """
        for case, load in self._loads.items():
            end_ns = time.monotonic_ns() + PATH_LIMIT_NS
            while load.run(WARM_UP_NS).lost:
                if time.monotonic_ns() > end_ns:
                    raise UserError(f"IPv{case[0]} {case[1]}: packets do not come through")
            sent = 0
            while sent < load.packets_of_all_turns:
                sent += load.run(WARM_UP_NS).sent

    def run(self, case: tuple[int, str], duration_ns: int) -> Slice:
        """Run one slice; what it received must really have come through."""
        result = self._loads[case].run(duration_ns)
        if not 0 < result.received <= min(result.sent, result.received_interface):
            raise UserError(f"IPv{case[0]} {case[1]}: not a count of forwarded packets: {result}")
        return result


def measure(
    *,
    sizes: Sequence[Size],
    rounds: int,
    slice_ns: int,
    seed: int,
    features: Features,
) -> dict[str, Any]:
    """Measure with each number of leases and anchors; return the figures, by `Size.name`."""
    order = random.Random(seed)
    common.allow_many_files()
    slices: dict[tuple[Size, tuple[int, str], str], list[Slice]] = {}
    with ExitStack() as undo, _one_cpu() as cpu:
        plain = {arm: Chain(leases=None, features=features) for arm in (PLAIN, AGAIN)}
        for chain in plain.values():
            undo.callback(chain.close)
        loads: dict[tuple[Size, str], Loads] = {}
        gated: dict[Size, Chain] = {}
        for size in sizes:
            steered = gated[size] = Chain(
                leases=size.leases, anchors=size.anchors, features=features
            )
            undo.callback(steered.close)
            steered.grant(QOS if size.marked else BEST_EFFORT)
            for arm, chain in (*plain.items(), (STEERED, steered)):
                loads[size, arm] = Loads(chain, size.leases, undo)
        for found in loads.values():
            found.warm_up()
        for _ in common.steps("forwarding", rounds):
            todo = [(size, case) for size in sizes for case in CASES]
            order.shuffle(todo)
            for size, case in todo:
                for arm in order.sample(ARMS, len(ARMS)):
                    result = loads[size, arm].run(case, slice_ns)
                    slices.setdefault((size, case, arm), []).append(result)
        refused = sum(sum(chain.gate.drops().values()) for chain in gated.values() if chain.gate)
        unused = {size.name: _unused_flows(chain) for size, chain in gated.items()}
    by_size: dict[str, dict[str, Any]] = {}
    for size in sizes:
        found_at = by_size[size.name] = {"ipv4": {}, "ipv6": {}}
        for case in CASES:
            arms = {arm: slices[size, case, arm] for arm in ARMS}
            found_at[f"ipv{case[0]}"][case[1]] = _compare(arms, seed)
    return {
        "ratio": {name: found["ipv4"]["uplink"]["ratio"] for name, found in by_size.items()},
        "ratio_ipv6": {name: found["ipv6"]["uplink"]["ratio"] for name, found in by_size.items()},
        "by_live_leases": by_size,
        "leases": {size.name: size.leases for size in sizes},
        "anchors": {size.name: size.anchors for size in sizes},
        "flows_without_packets": unused,
        "fast_path": features.tc_bpf,
        "dropped_by_gate_packets": refused,
        "payload_bytes": PAYLOAD_BYTES,
        "cpu": cpu,
        "method": METHOD,
    }


def _unused_flows(chain: Chain) -> int:
    """Return how many flows of leases saw no packet in one of the directions, by their counters."""
    assert chain.gate is not None
    usages = [flow.usage for flow in chain.gate.enforced()]
    return sum(not (usage.uplink_packets and usage.downlink_packets) for usage in usages)


def _compare(arms: dict[str, list[Slice]], seed: int) -> dict[str, Any]:
    def ratios(arm: str) -> list[float]:
        pairs = zip(arms[arm], arms[PLAIN], strict=True)
        return [ours.rate_pps / plain.rate_pps for ours, plain in pairs]

    extra_ns = [
        1e9 / steered.rate_pps - 1e9 / plain.rate_pps
        for steered, plain in zip(arms[STEERED], arms[PLAIN], strict=True)
    ]
    return {
        "ratio": common.ratio(ratios(STEERED), seed),
        "noise_floor_ratio": common.ratio(ratios(AGAIN), seed),
        "extra_ns_per_packet": common.ratio(extra_ns, seed),
        "arms": {
            arm: {
                "sent": sum(result.sent for result in found),
                "received": sum(result.received for result in found),
                "lost": sum(result.lost for result in found),
                "rate_pps": common.quantiles([result.rate_pps for result in found]),
            }
            for arm, found in arms.items()
        },
    }


@contextmanager
def _one_cpu() -> Iterator[int]:
    """Stay on one CPU, and come back to all of them."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, allowed)


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    rows = []
    for leases, families in figures["by_live_leases"].items():
        for family, directions in families.items():
            for direction, found in directions.items():
                ratio, floor = found["ratio"], found["noise_floor_ratio"]
                arms = found["arms"]
                rows.append(
                    (
                        f"{leases} {family} {direction}",
                        f"{arms[PLAIN]['rate_pps']['p50']:,.0f}",
                        f"{arms[STEERED]['rate_pps']['p50']:,.0f}",
                        rf"{ratio['p50']:.3f} \[{ratio['ci95'][0]:.3f}, {ratio['ci95'][1]:.3f}]",
                        f"{floor['p50']:.3f}",
                        f"{found['extra_ns_per_packet']['p50']:,.0f}",
                        f"{sum(arm['lost'] for arm in arms.values()):,}",
                    )
                )
    columns = ("leases", "plain pps", "steered pps", "ratio", "plain/plain", "+ns", "lost")
    caption = "ratio: median [95 % interval]; plain/plain: the noise floor; lost: of all arms"
    common.print_table("Steered against plain forwarding", columns, rows, caption)
