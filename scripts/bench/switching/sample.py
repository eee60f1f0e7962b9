"""One switch as the traffic saw it, whatever the traffic was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.bench.switching.network import Switched
from scripts.interruption import Trace, interruption


@dataclass(frozen=True, slots=True)
class Sample:
    """One switch. Times count from when its command was begun; NaN: there was no such packet."""

    sent: int
    lost: int
    duplicated: int
    reordered: int
    loss_outage_ms: float
    """Lost packets times the interval."""
    gap_outage_ms: float
    """By the clock, over the runs of lost packets (see `interruption`)."""
    command_ms: float
    """Until the command said that it was done."""
    first_at_new_ms: float
    last_at_old_ms: float


def sample(
    trace: Trace, switched: Switched, window: slice, interval_ns: int, new_site: int
) -> Sample:
    """Return what a window of a trace, from shortly before a switch, tells of it.

    A packet is known by its receive stamp, so a trace of requests has the begin of each there.
    """
    figures = interruption(trace, window, interval_ns)
    stamps_ns, site = trace.recv_ns[window], trace.site[window]
    came = ~trace.lost[window]
    after = came & (site == new_site) & (stamps_ns >= switched.begin_ns)
    at_new, at_old = stamps_ns[after], stamps_ns[came & (site != new_site)]
    return Sample(
        sent=figures.sent,
        lost=figures.lost,
        duplicated=figures.duplicated,
        reordered=figures.reordered,
        loss_outage_ms=figures.loss_outage_ms,
        gap_outage_ms=figures.gap_outage_ms,
        command_ms=(switched.end_ns - switched.begin_ns) / 1e6,
        first_at_new_ms=(at_new.min() - switched.begin_ns) / 1e6 if at_new.size else np.nan,
        last_at_old_ms=(at_old.max() - switched.begin_ns) / 1e6 if at_old.size else np.nan,
    )


def samples(
    trace: Trace,
    switches: Sequence[Switched],
    *,
    before_ns: int,
    end_ns: int,
    interval_ns: int,
    sites: Sequence[int],
) -> list[Sample]:
    """Cut a trace at the switches, `before_ns` before each, and look at every piece.

    `sites`: where the service went with each.
    """
    begins = [switched.begin_ns - before_ns for switched in switches]
    return [
        sample(trace, switched, trace.window(begin_ns, until_ns), interval_ns, site)
        for switched, begin_ns, until_ns, site in zip(
            switches, begins, [*begins[1:], end_ns], sites, strict=True
        )
    ]
