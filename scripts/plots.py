"""The report's plots: SVG files in the folder's `plots/`, one function a plot.

Colours mean the same everywhere: an arm has its colour, a lost packet is red.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.analysis_expiry import LeaseEnd
from scripts.analysis_relocation import samples_of
from scripts.interruption import Trace
from scripts.records import Episode, ResultFolder

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LOST = "#d64545"
_ARMS = {"none": "#7b8794", "mbb": "#0a6c74", "bbm": "#c65d21"}
_MORE_ARMS = ("#5f4bb6", "#a61b6b", "#3f6212", "#1d4ed8")
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextmanager
def drawing(path: Path, width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure in the report's style, saved as SVG; the same data give the same bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        yield figure
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(path, format="svg", metadata=nothing)


def arm_colour(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm among the run's arms."""
    others = [name for name in arms if name not in _ARMS]
    return _ARMS.get(arm) or _MORE_ARMS[others.index(arm) % len(_MORE_ARMS)]


def outages(
    path: Path, results: ResultFolder, traces: dict[int, Trace], episodes: list[Episode]
) -> None:
    """Per direction, the share of relocations with at most so long an outage, an arm a line."""
    arms = list(dict.fromkeys(episode.arm for episode in episodes))
    directions = list(dict.fromkeys(flow.direction for flow in results.flows))
    with drawing(path, 9.6, 2.9) as figure:
        axes = _row(figure, len(directions))
        for place, direction in zip(axes, directions, strict=True):
            for order, arm in enumerate(arms):
                mine = [episode for episode in episodes if episode.arm == arm]
                samples = samples_of(results, traces, mine, direction)
                values = [sample.figures.gap_outage_ms for sample in samples]
                ecdf(place, values, arm, arm_colour(arm, arms), order)
            place.set_title(direction)
            place.set_xlabel("outage per relocation, ms")
        widest = max(place.get_xlim()[1] for place in axes)
        for place in axes:
            place.set_xlim(-0.03 * widest, widest)
        axes[0].set_ylabel("share of relocations")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")


def relocation_times(path: Path, episodes: list[Episode], summary: dict[str, Any]) -> None:
    """The distribution of relocation times, and the median of each phase."""
    everyone = list(summary["arms"])
    arms = [arm for arm in everyone if summary["arms"][arm]["relocation_ms"]["count"]]
    shades = {"prepare": 0.25, "commit": 0.5, "kernel": 0.75, "answer": 1.0}
    with drawing(path, 9.6, 2.7) as figure:
        left, right = _row(figure, 2, share_y=False)
        for order, arm in enumerate(arms):
            values = [
                (episode.answered_ns - episode.request_ns) / 1e6
                for episode in episodes
                if episode.arm == arm and episode.request_ns and episode.answered_ns
            ]
            ecdf(left, values, arm, arm_colour(arm, everyone), order)
            begin = 0.0
            phases = summary["arms"][arm]["relocation_ms"]["phases_ms"]
            for phase, shade in shades.items():
                median = phases[phase]["p50"] or 0.0
                right.barh(
                    arm,
                    median,
                    left=begin,
                    color=arm_colour(arm, everyone),
                    alpha=shade,
                    height=0.5,
                )
                begin += median
        left.set_title("request to answer")
        left.set_xlabel("relocation time, ms")
        left.set_ylabel("share of relocations")
        left.set_xlim(left=0)
        left.legend(loc="lower right")
        right.set_title("median of each phase")
        right.set_xlabel("ms; light to dark: " + ", ".join(shades))
        right.invert_yaxis()
        right.grid(axis="y", visible=False)


def delays(path: Path, summary: dict[str, Any]) -> None:
    """Median (dot) to 99th percentile (end of line) of the delay, by arm and phase."""
    arms = list(summary["arms"])
    directions = [name for name in summary["arms"][arms[0]] if name != "relocation_ms"]
    with drawing(path, 9.6, 2.7) as figure:
        axes = _row(figure, len(directions))
        for place, direction in zip(axes, directions, strict=True):
            for offset, arm in enumerate(arms):
                colour = arm_colour(arm, arms)
                for position, part in enumerate(("before", "during", "after")):
                    delay = summary["arms"][arm][direction]["delay_us"][part]
                    if delay["p50"] is None:
                        continue
                    x = position + (offset - (len(arms) - 1) / 2) * 0.18
                    place.plot([x, x], [delay["p50"], delay["p99"]], color=colour, lw=2)
                    label = arm if part == "before" else None
                    place.plot(x, delay["p50"], "o", color=colour, ms=5, label=label)
            place.set_yscale("log")
            place.set_xticks(range(3), ["before", "during", "after"])
            place.set_xlim(-0.5, 2.5)
            place.set_title("round trip" if direction == "roundtrip" else f"{direction}, one way")
            place.grid(axis="x", visible=False)
        axes[0].set_ylabel("delay, µs")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")


def lease_ends(path: Path, ends: list[LeaseEnd]) -> None:
    """When a lease's last packet came, relative to the deadline."""
    with drawing(path, 9.6, 2.7) as figure:
        (place,) = _row(figure, 1)
        values = {
            f"controller {fate}": [
                end.overrun_ms if end.overrun_packets else -end.early_ms
                for end in ends
                if end.lease.controller_killed is killed
                and (end.overrun_packets or not np.isnan(end.early_ms))
            ]
            for fate, killed in (("alive", False), ("killed", True))
        }
        every = np.concatenate([*values.values(), [0.0]])
        bins = np.histogram_bin_edges(every, bins=40)
        place.hist(
            list(values.values()),
            bins=bins.tolist(),
            label=list(values),
            color=[_ARMS["none"], _ARMS["mbb"]],
        )
        place.axvline(0, color=LOST, lw=1.2)
        place.text(0, 1.0, " deadline", color=LOST, transform=place.get_xaxis_transform())
        place.set_xlabel("last packet relative to the deadline, ms (right of it: overrun)")
        place.set_ylabel("leases × flows")
        place.legend(loc="upper left")


def _row(figure: Figure, count: int, share_y: bool = True) -> list[Axes]:
    grid = figure.subplots(1, count, sharey=share_y, squeeze=False)
    return list(grid[0])


def ecdf(place: Axes, values: Sequence[float], label: str, colour: str, order: int) -> None:
    """Draw a sample's distribution as a line; `order` tells lines on top of each other apart."""
    ordered = np.sort(np.asarray(values, float))
    if not ordered.size:
        return
    steps = np.arange(1, ordered.size + 1) / ordered.size
    # From the axis up, so that a sample of zeros is a visible line; later lines are thinner, so
    # that the ones below them show.
    x, y = np.concatenate(([ordered[0]], ordered)), np.concatenate(([0.0], steps))
    dash, width = _DASHES[order % len(_DASHES)], max(1.4, 3.4 - order)
    place.step(x, y, where="post", color=colour, ls=dash, lw=width, label=label)
    place.set_ylim(0, 1.03)
