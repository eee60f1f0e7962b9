"""Relocation by a lease beside what people use today: one interleaved run of all methods."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts import statistics
from scripts.bench import common
from scripts.bench.switching import datagrams, requests
from scripts.bench.switching.methods import IN_KERNEL, Method, NftTwoCalls, NoSwitch, Traffic
from scripts.bench.switching.programs import PROGRAMS
from scripts.bench.switching.sample import Sample
from topologies.linux import set_priority
from upf.features import Features

METHOD = """\
Each method has a network of its own, all alike: UE, router and two anchors that own the service
address, four namespaces and three veth pairs, one clock. Visits of a few switches, there and back,
go to methods and kinds of traffic in random order within each round. All programs run at nice -10,
on CPUs that do not send. datagrams: 64-byte UDP uplink at rate_pps with sequence numbers and send
times, sent from a CPU that has nothing else to do; kernel receive stamps at both anchors; drops of
the probe's own sockets would end the run. Before each switch there is a stretch as long without
one: quiet_lost of quiet_sent, which is what the method's network loses by itself. requests: HTTP
GET every 10 ms by httpx, each on a connection of its own, answered after 20 ms by uvicorn, so that
some are under way at every switch, from that same CPU; lost: requests without a complete answer.
outage_ms: over the runs of lost packets (requests), the send time of the first one after minus that
of the last before, minus one interval; loss_outage_ms: lost times the interval, and
outages_disagree: in how many switches the two differ by more than one interval, which is the
resolution. first_at_new_ms, last_at_old_ms: from the begin of the command to the kernel's receive
stamp of the first packet at the new anchor, and of the last at the old (requests: to the begin of
the first that the new one answered, of the last that the old one did). command_ms: until the
command says that it is done; commands are started as a user would start them, and that is part of
it, while lease and haproxy's runtime API are calls of a running process. none is the noise floor,
nft_two_calls the control that must lose. Only lease is gated by a lease; `guarantees` says what
else differs."""

SWITCHES_PER_VISIT = 5
NICE = -10
"""Of all that takes part, as Open vSwitch's own start script has it (ovs-ctl)."""
METHODS: tuple[type[Method], ...] = (*IN_KERNEL, *PROGRAMS)


@dataclass(slots=True)
class Course:
    """A method under way: which anchor the service is at, and what was seen so far."""

    method: Method
    at: int
    samples: dict[Traffic, list[Sample]]
    quiet: list[Sample] = field(default_factory=list)
    """Stretches of datagrams without a switch."""

    def visit(self, traffic: Traffic, count: int, rate_pps: int, order: random.Random) -> None:
        """Switch so many times under this traffic."""
        first = 1 - self.at
        if traffic is Traffic.DATAGRAMS:
            found, quiet = datagrams.visit(self.method, first, count, rate_pps, order)
            self.quiet += quiet
        else:
            found = requests.visit(self.method, first, count, order)
        self.at = (self.at + count) % 2
        self.samples[traffic] += found


def measure(
    *,
    switches: int,
    rate_pps: int,
    seed: int,
    features: Features,
    methods: Sequence[str],
    per_visit: int = SWITCHES_PER_VISIT,
) -> dict[str, Any]:
    """Have methods, and the noise floor, switch so often; return the figures.

    What this machine has not the programs for is skipped by name.
    """
    order = random.Random(seed)
    chosen = [method for method in METHODS if method.name in (NoSwitch.name, *methods)]
    missing = {method.name: method.missing() for method in chosen}
    skipped = {name: why for name, why in missing.items() if why}
    for name, why in skipped.items():
        common.console.print(f"{name}: skipped, {why}", highlight=False)
    with ExitStack() as undo:
        undo.enter_context(_undisturbed())
        courses = [
            Course(method(undo, features), 0, {traffic: [] for traffic in method.traffic})
            for method in chosen
            if method.name not in skipped
        ]
        undo.enter_context(requests.servers([course.method for course in courses]))
        counts = [per_visit] * (switches // per_visit)
        counts += [switches % per_visit] if switches % per_visit else []
        visits = []
        for count in counts:
            some = [(course, traffic, count) for course in courses for traffic in course.samples]
            order.shuffle(some)
            visits += some
        for number in common.steps("switch", len(visits)):
            course, traffic, count = visits[number]
            course.visit(traffic, count, rate_pps, order)
    figures: dict[str, Any] = {
        course.method.name: _figures(course, rate_pps, seed) for course in courses
    }
    return {"methods": figures, "skipped": skipped, "blind": _blind(figures), "method": METHOD}


def _blind(figures: dict[str, Any]) -> bool:
    """Whether the control lost nothing or is missing, or the noise floor lost something."""
    control, floor = figures.get(NftTwoCalls.name), figures[NoSwitch.name]
    return bool(floor["lost"]) or not control or not control["lost"]


def _figures(course: Course, rate_pps: int, seed: int) -> dict[str, Any]:
    method = course.method
    intervals_ms = {
        Traffic.DATAGRAMS: 1e3 / rate_pps,
        Traffic.REQUESTS: float(requests.INTERVAL_MS),
    }
    by_traffic = {
        str(traffic): _summary(samples, intervals_ms[traffic], seed)
        for traffic, samples in course.samples.items()
    }
    if course.quiet:
        by_traffic[Traffic.DATAGRAMS] |= {
            "quiet_sent": sum(sample.sent for sample in course.quiet),
            "quiet_lost": sum(sample.lost for sample in course.quiet),
        }
    first = method.traffic[0]
    return {
        "lost": by_traffic[first]["lost"],
        "outage_ms": by_traffic[first]["outage_ms"],
        "traffic": str(first),
        **by_traffic,
        "settings": method.settings,
        "guarantees": method.guarantees,
        "version": method.version(),
    }


def _summary(samples: list[Sample], interval_ms: float, seed: int) -> dict[str, Any]:
    hit = sum(sample.lost > 0 for sample in samples)
    gaps_ms = [sample.gap_outage_ms for sample in samples]
    pairs = [(sample.gap_outage_ms, sample.loss_outage_ms) for sample in samples]
    return {
        "switches": len(samples),
        "sent": sum(sample.sent for sample in samples),
        "lost": sum(sample.lost for sample in samples),
        "duplicated": sum(sample.duplicated for sample in samples),
        "reordered": sum(sample.reordered for sample in samples),
        "switches_with_loss": hit,
        "switches_with_loss_ci95": statistics.binomial_interval(hit, len(samples)),
        "outage_ms": {
            **statistics.quantiles(gaps_ms),
            "p50_ci95": statistics.median_interval(gaps_ms, seed),
        },
        "loss_outage_ms": statistics.quantiles([sample.loss_outage_ms for sample in samples]),
        "outages_disagree": sum(abs(gap - loss) > interval_ms for gap, loss in pairs),
        "resolution_ms": interval_ms,
        "command_ms": statistics.quantiles([sample.command_ms for sample in samples]),
        "first_at_new_ms": _known([sample.first_at_new_ms for sample in samples]),
        "last_at_old_ms": _known([sample.last_at_old_ms for sample in samples]),
        "outages_ms": gaps_ms,
    }


def _known(values: list[float]) -> dict[str, float] | None:
    """Return quantiles of what there was; None if there was nothing."""
    known = [value for value in values if not np.isnan(value)]
    return statistics.quantiles(known) if known else None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep this process, and what it starts, off the CPU that sends, and before other work."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, (allowed - {datagrams.SENDER_CPU}) or allowed)
    set_priority(0, NICE)
    try:
        yield
    finally:
        set_priority(0, 0)
        os.sched_setaffinity(0, allowed)


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    rows: list[tuple[str, ...]] = []
    for name, found in figures["methods"].items():
        for traffic in Traffic:
            if str(traffic) not in found:
                continue
            one = found[str(traffic)]
            outage, new = one["outage_ms"], one["first_at_new_ms"]
            rows.append(
                (
                    f"{name} {traffic}",
                    f"{one['switches']}",
                    f"{one['sent']:,}",
                    f"{one['lost']:,}",
                    f"{one['quiet_lost']:,}" if "quiet_lost" in one else "",
                    f"{outage['p50']:.1f} / {outage['max']:.1f}",
                    f"{one['command_ms']['p50']:.2f}",
                    f"{new['p50']:.2f} / {new['p99']:.2f}" if new and name != NoSwitch.name else "",
                )
            )
    rows += [(f"{name} skipped", *[""] * 7) for name in figures["skipped"]]
    columns = [
        "method",
        "switches",
        "sent",
        "lost",
        "quiet lost",
        "outage p50 / max, ms",
        "command, ms",
    ]
    columns += ["first at new p50 / p99, ms"]
    caption = "blind: the control lost nothing or is missing, or the noise floor lost something"
    common.print_table("Relocation", columns, rows, caption if figures["blind"] else "")
