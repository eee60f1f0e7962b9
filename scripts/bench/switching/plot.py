"""The plot of outages and of times to switch, by method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.switching.methods import Traffic
from scripts.plots import FAINT, INK, LOST, drawing

_COLOURS = {Traffic.DATAGRAMS: "#0a6c74", Traffic.REQUESTS: "#c65d21"}
ROW_IN = 0.34


def plot(path: Path, figures: dict[str, Any], rate_pps: int) -> None:
    """Draw every switch's outage, and the time to the first packet at the new anchor (SVG)."""
    rows = [
        (name, traffic, found[str(traffic)])
        for name, found in figures["methods"].items()
        for traffic in Traffic
        if str(traffic) in found
    ]
    spread = np.random.default_rng(1)
    with drawing(path, 9.6, 1.4 + ROW_IN * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row, (name, traffic, found) in enumerate(rows):
            colour = _COLOURS[traffic]
            outages = np.array(found["outages_ms"])
            y = row + spread.uniform(-0.18, 0.18, outages.size)
            left.plot(outages, y, "o", color=colour, ms=3, alpha=0.5, mew=0)
            left.plot(found["outage_ms"]["p50"], row, "|", color=INK, ms=14, mew=2)
            lost = f"{found['lost']:,} lost"
            left.text(
                1.0,
                row,
                lost,
                transform=left.get_yaxis_transform(),
                color=LOST if found["lost"] else FAINT,
                va="center",
                ha="right",
            )
            new = found["first_at_new_ms"]
            if new and name != "none":
                right.plot([new["p50"], new["p99"]], [row, row], color=colour, lw=2)
                right.plot(new["p50"], row, "o", color=colour, ms=5)
        left.set_xscale("symlog", linthresh=1)
        left.set_xlim(-0.2, 1e4)
        right.set_xscale("log")
        left.set_yticks(range(len(rows)), [f"{name}, {traffic}" for name, traffic, _ in rows])
        left.invert_yaxis()
        left.set_title("outage of each switch (bar: median)")
        left.set_xlabel(f"ms, linear below 1 (UDP at {rate_pps:,}/s; HTTP at 100/s)")
        right.set_title("first packet or request at the new anchor")
        right.set_xlabel("ms from the begin of the command, p50 to p99")
