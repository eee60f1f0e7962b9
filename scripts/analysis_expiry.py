"""The expiry experiment's figures: how far the user plane overran or fell short of a deadline.

A packet counts by its kernel receive stamp. It overran a lease if it was received after the
lease's deadline and before the UE's next lease. A lease ended early by the time from its last
packet to its deadline, if the UE was still offering packets then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.interruption import Trace
from scripts.records import Lease, ResultFolder
from scripts.statistics import quantiles

OFFERING_INTERVALS = 10
"""A UE is offering packets at a deadline if it sent one within so many intervals before it."""
_FOREVER_NS = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """How one lease's end looked to one flow."""

    lease: Lease
    flow: int
    direction: str
    received: int
    """Packets received between grant and deadline."""
    overrun_packets: int
    overrun_ms: float
    """From the deadline to the last packet that overran it; 0 if none did."""
    early_ms: float
    """From the last packet to the deadline; NaN if none was received or none was offered."""


def expiry_summary(results: ResultFolder, traces: dict[int, Trace]) -> dict[str, Any]:
    """The summary's figures: over all, by the controller's fate and by direction."""
    ends = lease_ends(results, traces)
    leases = results.leases()
    fates = {"killed": True, "alive": False}
    directions = dict.fromkeys(flow.direction for flow in results.flows)
    return {
        "leases": len(leases),
        "controller_killed": sum(lease.controller_killed for lease in leases),
        **_figures(ends),
        "resolution_ms": results.interval_ns / 1e6,
        "by_controller": {
            fate: {
                "leases": sum(lease.controller_killed is killed for lease in leases),
                **_figures(end for end in ends if end.lease.controller_killed is killed),
            }
            for fate, killed in fates.items()
        },
        "by_direction": {
            direction: _figures(end for end in ends if end.direction == direction)
            for direction in directions
        },
    }


def lease_ends(results: ResultFolder, traces: dict[int, Trace]) -> list[LeaseEnd]:
    """Every lease's end as each flow of its UE saw it."""
    leases = sorted(results.leases(), key=lambda lease: lease.deadline_ns)
    ends = []
    for flow in results.flows:
        mine = [lease for lease in leases if lease.ue == flow.ue]
        begins = [lease.requested_ns for lease in mine]
        nexts = [*begins, _FOREVER_NS][1:]
        for lease, begin_ns, next_ns in zip(mine, begins, nexts, strict=True):
            end = _lease_end(traces[flow.id], lease, begin_ns, next_ns, results.interval_ns)
            ends.append(LeaseEnd(lease, flow.id, flow.direction, *end))
    return ends


def _lease_end(
    trace: Trace, lease: Lease, begin_ns: int, next_ns: int, interval_ns: int
) -> tuple[int, int, float, float]:
    deadline_ns = lease.deadline_ns
    # Arrivals low to high are the lease's, high to after overran it. One stamped exactly at the
    # deadline is in time.
    low, high = np.searchsorted(trace.arrivals_ns, [begin_ns, deadline_ns + 1])
    after = max(int(np.searchsorted(trace.arrivals_ns, next_ns)), int(high))
    overrun_ms = (int(trace.arrivals_ns[after - 1]) - deadline_ns) / 1e6 if after > high else 0.0
    recently_ns = deadline_ns - OFFERING_INTERVALS * interval_ns
    offered = trace.window(recently_ns, deadline_ns)
    early_ms = float("nan")
    if high > low and offered.stop > offered.start:
        early_ms = (deadline_ns - int(trace.arrivals_ns[high - 1])) / 1e6
    return int(high - low), int(after - high), overrun_ms, early_ms


def _figures(ends: Iterable[LeaseEnd]) -> dict[str, Any]:
    chosen = list(ends)
    early_ms = [end.early_ms for end in chosen if not np.isnan(end.early_ms)]
    return {
        "overrun_packets": sum(end.overrun_packets for end in chosen),
        "overrun_ms_max": max((end.overrun_ms for end in chosen), default=float("nan")),
        "early_ms_max": max(early_ms, default=float("nan")),
        "early_ms": quantiles(early_ms),
        "leases_overrun": len({end.lease.lease for end in chosen if end.overrun_packets}),
        "lease_flows": len(chosen),
        "lease_flows_without_packets": sum(end.received == 0 for end in chosen),
    }
