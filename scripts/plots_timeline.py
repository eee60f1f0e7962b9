"""Timelines: what became of each packet around one relocation, or one lease's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from scripts.interruption import Trace
from scripts.plots import FAINT, INK, LOST, drawing
from scripts.records import Episode, Lease, ResultFolder

ANCHORS = ("#0a6c74", "#7a3e9d")
"""Colours of source and target."""
_INSTANTS = {
    "request": "request_ns",
    "prepared": "prepared_ns",
    "committed": "committed_ns",
    "kernel acknowledged": "kernel_ack_ns",
    "downlink source moved": "switched_ns",
    "answered": "answered_ns",
}


def span_ms(episode: Episode, longest_loss_ms: float) -> tuple[float, float]:
    """From when to when, relative to the request, a timeline should show a relocation."""
    done_ms = (_done_ns(episode) - episode.request_ns) / 1e6
    margin_ms = max(2.0, 0.25 * done_ms)
    return -margin_ms, max(done_ms, longest_loss_ms) + margin_ms


def relocation(
    path: Path,
    results: ResultFolder,
    traces: dict[int, Trace],
    episode: Episode,
    limits_ms: tuple[float, float],
) -> None:
    """One relocation: a lane a direction, a mark a packet, at the anchor that had it."""
    flows = [flow for flow in results.flows if flow.ue == episode.ue]
    anchors = (episode.source, episode.target)
    with drawing(path, 9.6, 1.5 + 0.85 * len(flows)) as figure:
        grid = figure.subplots(
            len(flows) + 1, 1, sharex=True, squeeze=False, height_ratios=[1.0] + [0.85] * len(flows)
        )
        steps, *lanes = list(grid[:, 0])
        for place, flow in zip(lanes, flows, strict=True):
            _lane(place, results, traces[flow.id], episode.request_ns, limits_ms, anchors)
            place.set_ylabel(flow.direction, rotation=0, ha="right", va="center", labelpad=38)
        instants = [
            (name, (getattr(episode, field) - episode.request_ns) / 1e6)
            for name, field in _INSTANTS.items()
            if getattr(episode, field)
        ]
        _staircase(steps, lanes, instants, limits_ms)
        lanes[-1].set_xlabel("send time, ms from the request")
        lanes[-1].set_xlim(limits_ms)


def lease(path: Path, results: ResultFolder, traces: dict[int, Trace], one: Lease) -> None:
    """One lease's end: the whole lease above, the deadline's surroundings below."""
    flows = [flow for flow in results.flows if flow.ue == one.ue]
    sites = _sites_during(results, [traces[flow.id] for flow in flows], one)
    whole_ms = ((one.requested_ns - one.deadline_ns) / 1e6 - 30, 60.0)
    with drawing(path, 9.6, 2.2 + 0.9 * len(flows)) as figure:
        for part, (limits_ms, title) in zip(
            figure.subfigures(1, 2, squeeze=False, width_ratios=[3, 2])[0],
            ((whole_ms, "the whole lease"), ((-20.0, 20.0), "around the deadline")),
            strict=True,
        ):
            grid = part.subplots(
                len(flows) + 1,
                1,
                sharex=True,
                squeeze=False,
                height_ratios=[1.0] + [0.85] * len(flows),
            )
            steps, *lanes = list(grid[:, 0])
            for place, flow in zip(lanes, flows, strict=True):
                _lane(place, results, traces[flow.id], one.deadline_ns, limits_ms, sites)
                place.set_ylabel(flow.direction, rotation=0, ha="right", va="center", labelpad=38)
            instants = [
                (name, (at - one.deadline_ns) / 1e6)
                for name, at in (
                    ("requested", one.requested_ns),
                    ("kernel acknowledged", one.kernel_ack_ns),
                    ("controller killed", one.killed_ns),
                    ("deadline", one.deadline_ns),
                )
                if at and limits_ms[0] <= (at - one.deadline_ns) / 1e6 <= limits_ms[1]
            ]
            _staircase(steps, lanes, instants, limits_ms)
            steps.set_title(title)
            lanes[-1].set_xlabel("send time, ms from the deadline")
            lanes[-1].set_xlim(limits_ms)


def _sites_during(results: ResultFolder, traces: Sequence[Trace], one: Lease) -> list[str]:
    """The anchors that had packets while the lease was alive."""
    found: set[int] = set()
    for trace in traces:
        window = trace.window(one.requested_ns, one.deadline_ns)
        found |= set(trace.site[window][~trace.lost[window]].tolist())
    return [results.sites[index] for index in sorted(found)]


def _lane(
    place: Axes,
    results: ResultFolder,
    trace: Trace,
    zero_ns: int,
    limits_ms: tuple[float, float],
    anchors: Sequence[str],
) -> None:
    """A flow's packets: a row for each anchor, the lost ones as crosses between them."""
    low, high = (zero_ns + int(limit * 1e6) for limit in limits_ms)
    window = trace.window(low, high)
    at_ms = (trace.send_ns[window] - zero_ns) / 1e6
    lost, site = trace.lost[window], trace.site[window]
    names = list(dict.fromkeys(anchors))
    rows = {name: 1.0 - index for index, name in enumerate(names)}
    for name, colour in zip(names, ANCHORS, strict=False):
        mine = at_ms[~lost & (site == results.sites.index(name))]
        place.plot(mine, np.full(len(mine), rows[name]), "|", color=colour, ms=9, mew=0.8)
    missing = at_ms[lost]
    place.plot(missing, np.full(len(missing), 0.5), "x", color=LOST, ms=4.5, mew=0.9)
    place.set_yticks(list(rows.values()), list(rows))
    for label, colour in zip(place.get_yticklabels(), ANCHORS, strict=False):
        label.set_color(colour)
    place.set_ylim(min(rows.values(), default=1.0) - 0.6, 1.5)
    place.grid(visible=False)
    place.tick_params(left=False)
    place.spines["left"].set_visible(False)


def _staircase(
    steps: Axes,
    lanes: Sequence[Axes],
    instants: Sequence[tuple[str, float]],
    limits_ms: tuple[float, float],
) -> None:
    """Name the instants above the lanes, each on a step of its own, and draw them through.

    Steps go down in the left half, where names stand right of their lines, and up in the right
    half, where they stand left: so no name crosses a line.
    """
    middle = sum(limits_ms) / 2
    gap = (limits_ms[1] - limits_ms[0]) * 0.006
    falling = sorted((each for each in instants if each[1] < middle), key=lambda each: each[1])
    rising = sorted((each for each in instants if each[1] >= middle), key=lambda each: -each[1])
    for step, (name, at_ms) in enumerate([*falling, *rising]):
        height = 1 - (step + 0.5) / len(instants)
        steps.plot([at_ms, at_ms], [0, height], color=FAINT, lw=0.8)
        steps.text(
            at_ms + (gap if at_ms < middle else -gap),
            height,
            f"{name}  {at_ms:.2f} ms",
            ha="left" if at_ms < middle else "right",
            va="center",
            color=INK,
            fontsize=8,
        )
        for place in lanes:
            place.axvline(at_ms, color=FAINT, lw=0.8, zorder=0)
    steps.set_ylim(0, 1)
    steps.axis("off")


def _done_ns(episode: Episode) -> int:
    return max(episode.answered_ns, episode.kernel_ack_ns, episode.switched_ns, episode.request_ns)
