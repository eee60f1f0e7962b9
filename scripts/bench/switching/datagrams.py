"""What datagrams tell of switches: paced, numbered, stamped by the kernel at both anchors."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from scripts.bench.switching.methods import Method
from scripts.bench.switching.network import SERVICE, UE, Switched
from scripts.bench.switching.sample import Sample, samples
from scripts.errors import UserError
from scripts.interruption import Trace, build_trace
from topologies.endpoints.probe_plan import Direction, Flow, ProbePlan, Site
from topologies.endpoints.probe_records import RECEIVED_FILE, SENT_FILE
from topologies.endpoints.probe_session import ProbeSession, ProbeStats

PORT = 5000
WAITING_TIME_MS = 100
BEGIN_S, END_S = 0.1, 0.1
BETWEEN_S = (0.12, 0.2)
MAX_DURATION_S = 120.0
FIRST_ANCHOR_SITE = 1
BEFORE_NS = 20_000_000
CPUS = os.sched_getaffinity(0)


SENDER_CPU = max(CPUS) if len(CPUS) > 1 else None
"""Sends, and does nothing else: everything else is kept off it."""


def visit(
    method: Method, first: int, count: int, rate_pps: int, order: random.Random
) -> tuple[list[Sample], list[Sample]]:
    """Switch `count` times under datagrams, to `first` at first.

    Returns what each switch came to, and the same of as many stretches without one, each before a
    switch: what is lost there is lost by the method's network, and not by switching.
    """
    plan = _plan(method, rate_pps)
    with tempfile.TemporaryDirectory(prefix="datagrams-") as name:
        folder = Path(name)
        instants, sites = [], []
        with ProbeSession(plan, folder) as probe:
            time.sleep(BEGIN_S)
            for number in range(count):
                target = (first + number) % 2
                time.sleep(order.uniform(*BETWEEN_S))
                now_ns = time.time_ns()
                instants.append(Switched(now_ns, now_ns))
                time.sleep(order.uniform(*BETWEEN_S))
                instants.append(method.switch(target))
                sites += [FIRST_ANCHOR_SITE + 1 - target, FIRST_ANCHOR_SITE + target]
            time.sleep(END_S)
            end_ns = time.time_ns()
            stats = probe.stop()
        _check(method, stats)
        trace = _trace(folder, plan)
    found = samples(
        trace,
        instants,
        before_ns=BEFORE_NS,
        end_ns=end_ns,
        interval_ns=plan.interval_ns,
        sites=sites,
    )
    return found[1::2], found[::2]


def _plan(method: Method, rate_pps: int) -> ProbePlan:
    network = method.network
    sites = {"ue": network.ue, "anchor0": network.anchors[0], "anchor1": network.anchors[1]}
    flow = Flow(
        id=1,
        ue="ue",
        direction=Direction.UPLINK,
        ue_address=str(UE),
        ue_port=PORT,
        service_address=str(SERVICE),
        service_port=PORT,
        anchors=("anchor0", "anchor1"),
    )
    return ProbePlan(
        sites=tuple(Site(name=name, netns=one.path) for name, one in sites.items()),
        flows=(flow,),
        rate_pps=rate_pps,
        max_duration_s=MAX_DURATION_S,
        sender_cpu=SENDER_CPU,
        waiting_time_ms=WAITING_TIME_MS,
    )


def _check(method: Method, stats: ProbeStats) -> None:
    """What our own probe lost must not count as the method's."""
    for what, packets in (("overflowed", stats.overflow), ("could not send", stats.send_errors)):
        if packets:
            raise UserError(f"{method.name}: the probe {what} ({packets} packets): lower the rate")
    if stats.clock_stepped:
        raise UserError("the clock was set meanwhile: run this again")


def _trace(folder: Path, plan: ProbePlan) -> Trace:
    sent = pq.read_table(folder / SENT_FILE)
    received = pq.read_table(folder / RECEIVED_FILE)
    return build_trace(
        sent["send_ns"].to_numpy(),
        received["seq"].to_numpy(),
        received["site"].to_numpy(),
        received["recv_ns"].to_numpy(),
        plan.waiting_time_ms,
    )
