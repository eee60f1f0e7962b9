"""The page of a QoS run: its verdict, its figures, and a plot of rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.plots import INK, LOST, drawing
from scripts.records import ResultFolder
from scripts.report_words import Finding

BIN_NS = 100_000_000
_COLOURS = ("#0a6c74", "#c65d21", "#5f4bb6")


def qos_verdict(summary: dict[str, Any]) -> list[Finding]:
    """Say for each arm and direction what was kept, and whether the control shows the need."""
    findings = []
    for arm, directions in summary["arms"].items():
        for direction, figures in directions.items():
            rounds, kept = figures["rounds"], figures["rounds_kept"]
            text = f"{direction}: kept in {kept} of {rounds}; " + "; ".join(
                _in_words(name, flow) for name, flow in figures["flows"].items()
            )
            if arm == "qos":
                findings.append(Finding("good" if kept == rounds else "bad", arm, text))
            elif kept == 0:
                findings.append(Finding("plain", arm, text))
            else:
                text += ". The control kept it: there was no congestion."
                findings.append(Finding("doubt", arm, text))
    return findings


def _in_words(name: str, flow: dict[str, Any]) -> str:
    if "rate_to_gfbr" in flow:
        return (
            f"{name}: {flow['rate_to_gfbr']:.3f} of GFBR, "
            f"at most {flow['rate_to_mfbr_max']:.3f} of MFBR in a second"
        )
    p99_ms = flow["delay_ms"]["p99"]
    shown = "nothing came through" if p99_ms is None else f"p99 {p99_ms:.1f} ms"
    return f"{name}: {shown} of {flow['packet_delay_budget_ms']} ms, {flow['lost']} lost"


def rates_plot(path: Path, results: ResultFolder) -> None:
    """Draw the rate of each flow over time, an arm a row and a direction a column (round 0)."""
    parts = [part for part in results.qos() if part.round == 0]
    arms = list(dict.fromkeys(part.arm for part in sorted(parts, key=lambda one: one.arm != "qos")))
    directions = sorted({part.direction for part in parts})
    with drawing(path, 10, 2.6 * len(arms)) as figure:
        axes = figure.subplots(len(arms), len(directions), squeeze=False, sharex=True, sharey=True)
        for part in parts:
            axis = axes[arms.index(part.arm)][directions.index(part.direction)]
            edges = np.arange(part.start_ns, part.end_ns + 1, BIN_NS)
            seconds = (edges[:-1] - part.start_ns) / 1e9
            for plan, colour in zip(results.manifest["qos_flows"], _COLOURS, strict=True):
                mine = part.received["flow"] == plan["number"]
                counts, _ = np.histogram(part.received["recv_ns"][mine], edges)
                mbps = counts * plan["ip_bytes"] * 8 / (BIN_NS / 1e9) / 1e6
                axis.plot(seconds, mbps, color=colour, label=plan["name"], linewidth=1.2)
            inside = (part.stream_at_ns > part.start_ns) & (part.stream_at_ns <= part.end_ns)
            axis.plot(
                (part.stream_at_ns[inside] - part.start_ns) / 1e9,
                part.stream_bytes[inside] * 8 / (BIN_NS / 1e9) / 1e6,
                color=INK,
                label="TCP, best effort",
                linewidth=0.8,
                alpha=0.6,
            )
            rates = results.manifest["qos_flows"][0]
            for bps in (rates["gfbr_bps"], rates["mfbr_bps"]):
                axis.axhline(bps / 1e6, color=LOST, linewidth=0.7, linestyle=":")
            axis.set_title(f"{part.arm}, {part.direction}")
            axis.set_ylabel("Mbit/s")
        axes[-1][0].set_xlabel("s")
        axes[0][0].legend(loc="upper right", ncols=2)


def qos_page(results: ResultFolder, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw the plots; return what the template needs."""
    rates_plot(folder / "rates.svg", results)
    return {"title": "QoS flows", "verdict": qos_verdict(summary)}
