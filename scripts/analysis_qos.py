"""What a QoS run shows: rates against GFBR and MFBR, delays against the budget, what is left.

Rates are of IP packets. `rate_to_gfbr` is what came through of what was sent, over the whole run;
`rate_to_mfbr_max` the most that came through in any second (every tenth of one).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.records import QosPart, ResultFolder
from scripts.statistics import quantiles

WITHIN = 0.02
PACKET_TO_PAYLOAD = 1_500 / 1_448  # of TCP, with timestamps
SECOND_NS, STEP_NS = 1_000_000_000, 100_000_000


def qos_summary(results: ResultFolder) -> dict[str, Any]:
    """Return the figures of every arm and direction, the worst of its rounds, and the verdict."""
    cell_bps = int(results.manifest["cell_bps"])
    plans = results.manifest["qos_flows"]
    parts = results.qos()
    arms: dict[str, dict[str, Any]] = {}
    for part in parts:
        found = arms.setdefault(part.arm, {}).setdefault(part.direction, [])
        found.append(_part(part, plans, cell_bps))
    rounds = {
        arm: {direction: _worst(found) for direction, found in by_direction.items()}
        for arm, by_direction in arms.items()
    }
    kept = {
        arm: {direction: figures["kept"] for direction, figures in by_direction.items()}
        for arm, by_direction in rounds.items()
    }
    return {"cell_bps": cell_bps, "arms": rounds, "kept": kept, "problems": qos_problems(results)}


def _part(part: QosPart, plans: list[dict[str, Any]], cell_bps: int) -> dict[str, Any]:
    run_s = (part.end_ns - part.start_ns) / SECOND_NS
    flows = {plan["name"]: _flow(part, plan, run_s) for plan in plans}
    inside = (part.stream_at_ns > part.start_ns) & (part.stream_at_ns <= part.end_ns)
    stream_bps = float(np.sum(part.stream_bytes[inside])) * 8 * PACKET_TO_PAYLOAD / run_s
    others_bps = sum(flow["rate_bps"] for flow in flows.values())
    rest_bps = cell_bps * 1_500 / 1_514 - others_bps
    return {
        "flows": flows,
        "best_effort": {"rate_bps": stream_bps, "share_of_rest": stream_bps / max(rest_bps, 1)},
        "kept": all(flow["kept"] for flow in flows.values()),
    }


def _flow(part: QosPart, plan: dict[str, Any], run_s: float) -> dict[str, Any]:
    mine, got = part.sent["flow"] == plan["number"], part.received["flow"] == plan["number"]
    send_ns = part.sent["send_ns"][mine]
    seq, recv_ns = part.received["seq"][got], part.received["recv_ns"][got]
    delays_ms = (recv_ns - send_ns[seq]) / 1e6
    bits = plan["ip_bytes"] * 8
    rate_bps = len(seq) * bits / run_s
    steps = np.arange(part.start_ns, max(part.end_ns - SECOND_NS, part.start_ns) + 1, STEP_NS)
    ordered = np.sort(recv_ns)
    in_second = np.searchsorted(ordered, steps + SECOND_NS) - np.searchsorted(ordered, steps)
    figures: dict[str, Any] = {
        "offered_bps": len(send_ns) * bits / run_s,
        "rate_bps": rate_bps,
        "sent": len(send_ns),
        "lost": len(send_ns) - len(np.unique(seq)),
        "delay_ms": quantiles(delays_ms),
        "packet_delay_budget_ms": plan["packet_delay_budget_ms"],
    }
    kept = True
    if plan["gfbr_bps"] is not None:
        figures["rate_to_gfbr"] = rate_bps / plan["gfbr_bps"]
        figures["rate_to_mfbr_max"] = float(np.max(in_second)) * bits / plan["mfbr_bps"]
        kept = figures["rate_to_gfbr"] >= 1 - WITHIN and figures["rate_to_mfbr_max"] <= 1 + WITHIN
    else:
        p99_ms = figures["delay_ms"]["p99"]
        kept = figures["lost"] == 0 and p99_ms <= plan["packet_delay_budget_ms"]
    return {**figures, "kept": bool(kept)}


def _worst(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round that kept least: the one to show, and whether all kept."""
    ranked = sorted(
        rounds,
        key=lambda one: (
            one["kept"],
            min(flow.get("rate_to_gfbr", 1.0) for flow in one["flows"].values()),
        ),
    )
    return {**ranked[0], "rounds": len(rounds), "rounds_kept": sum(one["kept"] for one in rounds)}


def qos_problems(results: ResultFolder) -> list[str]:
    """Say what casts doubt on the figures; nothing for a sound run."""
    problems = []
    for part in results.qos():
        run_s = (part.end_ns - part.start_ns) / SECOND_NS
        for plan in results.manifest["qos_flows"]:
            sent = np.count_nonzero(part.sent["flow"] == plan["number"])
            offered_bps = sent * plan["ip_bytes"] * 8 / run_s
            if offered_bps < plan["rate_bps"] * (1 - WITHIN / 2):
                problems.append(
                    f"{part.arm}, {part.direction}: {plan['name']} was offered at "
                    f"{offered_bps / plan['rate_bps']:.1%} of its rate"
                )
    return problems
