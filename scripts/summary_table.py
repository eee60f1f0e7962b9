"""A summary as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

DIRECTIONS = ("uplink", "downlink", "roundtrip")


def render(summary: dict[str, Any]) -> Table:
    """The table of a summary."""
    match summary["experiment"]:
        case "expiry":
            return _expiry(summary)
        case "continuity":
            return _continuity(summary)
        case "qos":
            return _qos(summary)
        case _:
            return _relocation(summary)


def _continuity(summary: dict[str, Any]) -> Table:
    table = Table(
        title="What clients saw of a relocation",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="rst: requests ended by a reset or an early close. stall: the longest between two "
        "tokens, beyond their spacing, ms. moved: from the flip to the end of the last stream from "
        "the old anchor, ms, median and most.",
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("client", no_wrap=True)
    for name in ("of", "req.", "fail", "rst", "lost", "rep.", "stall", "moved"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, clients in summary["arms"].items():
        for client, row in clients.items():
            moved = row["moved_after_ms"]
            table.add_row(
                arm,
                client,
                f"{row['relocations']:,}",
                f"{row['requests']:,}",
                f"[bold red]{row['failed']:,}[/]" if row["failed"] else "0",
                f"{row['reset']:,}",
                f"[bold red]{row['tokens_lost']:,}[/]" if row["tokens_lost"] else "0",
                f"{row['tokens_repeated']:,}",
                number(row["longest_stall_ms"]["max"]),
                f"{number(moved['p50'])}, {number(moved['max'])}",
            )
            arm = ""
        table.add_section()
    return table


def _relocation(summary: dict[str, Any]) -> Table:
    times = "; ".join(
        f"{arm} {number(figures['relocation_ms']['p50'])} ms, "
        f"p99 {number(figures['relocation_ms']['p99'])} ms"
        for arm, figures in summary["arms"].items()
        if figures["relocation_ms"]["count"]
    )
    table = Table(
        title="What a relocation cost",
        caption=(
            f"outage: mean per relocation, ± one packet ({1000 / summary['rate_pps']:g} ms). "
            "hit: relocations with any loss, and the 95 % interval of its probability. "
            f"Time from request to answer, median: {times or 'nothing was relocated'}."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for name in ("of", "sent", "lost", "dup", "reord", "outage ms", "hit", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, figures in summary["arms"].items():
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
                f"{row['relocations_with_loss']:,}",
                f"{100 * low:.0f}–{100 * high:.1f} %",
            )
            arm = ""
        table.add_section()
    return table


def _expiry(summary: dict[str, Any]) -> Table:
    table = Table(
        title="What outlived its lease",
        box=SIMPLE_HEAD,
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


def _qos(summary: dict[str, Any]) -> Table:
    table = Table(
        title="What congestion left of QoS flows",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Rates in Mbit/s, delays in ms. /GFBR, /MFBR: of what was promised; of MFBR the "
        "most in any second. Of several rounds the worst.",
    )
    for name in ("arm", "flow"):
        table.add_column(name, no_wrap=True)
    for name in ("rate", "/GFBR", "/MFBR", "lost", "p99", "budget", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, directions in summary["arms"].items():
        for direction, figures in directions.items():
            for name, row in figures["flows"].items():
                table.add_row(
                    f"{arm} {direction.removesuffix('link')}",
                    name,
                    number(row["rate_bps"] / 1e6),
                    _ratio(row.get("rate_to_gfbr")),
                    _ratio(row.get("rate_to_mfbr_max")),
                    f"{row['lost']:,}",
                    number(row["delay_ms"]["p99"]),
                    f"{row['packet_delay_budget_ms']}",
                    "yes" if row["kept"] else "[bold red]no[/]",
                )
            rest = figures["best_effort"]
            share = f"{rest['share_of_rest']:.0%}"
            table.add_row("", "TCP, of the rest", number(rest["rate_bps"] / 1e6), share)
            table.add_section()
    return table


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def number(value: float | None) -> str:
    """A figure to three significant digits, never in powers of ten; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
