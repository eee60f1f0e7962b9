"""A summary as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

DIRECTIONS = ("uplink", "downlink", "roundtrip")


def render(summary: dict[str, Any]) -> Table:
    """The table of a relocation or expiry summary."""
    return _expiry(summary) if summary["experiment"] == "expiry" else _relocation(summary)


def _relocation(summary: dict[str, Any]) -> Table:
    table = Table(
        title="What a relocation cost",
        caption=(
            f"Mean outage per relocation, ± one packet: {1000 / summary['rate_pps']:g} ms. "
            "[ ]: 95 % interval of the probability of any loss."
        ),
    )
    table.add_column("arm")
    table.add_column("direction")
    for name in ("relocations", "sent", "lost", "dup.", "reord.", "outage ms", "any loss"):
        table.add_column(name, justify="right")
    table.add_column("relocation ms p50 / p99", justify="right")
    for arm, figures in summary["arms"].items():
        times = figures["relocation_ms"]
        time_text = f"{number(times['p50'])} / {number(times['p99'])}" if times["count"] else "–"
        for direction in DIRECTIONS:
            if direction not in figures:
                continue
            row = figures[direction]
            low, high = row["any_loss_probability_ci95"]
            table.add_row(
                arm,
                direction,
                f"{row['relocations']:,}",
                f"{row['sent']:,}",
                f"[bold red]{row['lost']:,}[/]" if row["lost"] else "0",
                f"{row['duplicated']:,}",
                f"{row['reordered']:,}",
                number(row["loss_outage_ms"]),
                rf"{row['relocations_with_loss']} \[{low:.1%}, {high:.1%}]",
                time_text,
            )
            arm = time_text = ""
        table.add_section()
    return table


def _expiry(summary: dict[str, Any]) -> Table:
    table = Table(
        title="What outlived its lease",
        caption=f"Resolution: one packet, {summary['resolution_ms']:g} ms.",
    )
    table.add_column("controller")
    for name in ("leases", "overrun packets", "overrun ms max", "early ms p50", "early ms max"):
        table.add_column(name, justify="right")
    rows = {"any": summary, **summary["by_controller"]}
    for fate, row in rows.items():
        table.add_row(
            fate,
            f"{row['leases']:,}",
            f"{row['overrun_packets']:,}",
            number(row["overrun_ms_max"]),
            number(row["early_ms"]["p50"]),
            number(row["early_ms_max"]),
        )
    return table


def number(value: float | None) -> str:
    """A figure to three significant digits, never in powers of ten; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
