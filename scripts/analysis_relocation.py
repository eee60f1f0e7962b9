"""The relocation experiment's figures: each arm's interruption, by direction, and its times.

A packet belongs to an episode if its UE is the episode's and it was sent within the episode's
window. What the other UEs lost meanwhile is counted apart, as `bystander_lost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.interruption import Interruption, Trace, interruption
from scripts.records import Columns, Episode, ResultFolder
from scripts.statistics import binomial_interval, median_interval, quantiles

CONTROL_ARM = "none"
NEGATIVE_CONTROL_ARM = "bbm"

_PHASES = {
    "prepare": ("request_ns", "prepared_ns"),
    "commit": ("prepared_ns", "committed_ns"),
    "kernel": ("committed_ns", "kernel_ack_ns"),
    "answer": ("kernel_ack_ns", "answered_ns"),
}
_TOTALS = ("sent", "received", "lost", "duplicated", "reordered", "late", "loss_periods")


@dataclass(frozen=True, slots=True)
class Sample:
    """One flow in one episode of its UE."""

    episode: Episode
    flow: int
    window: slice
    figures: Interruption


def relocation_summary(results: ResultFolder, traces: dict[int, Trace]) -> dict[str, Any]:
    """`arms` and `controls` of the summary."""
    episodes = results.episodes()
    unsent = results.unsent()
    arms: dict[str, Any] = {}
    for name in sorted({episode.arm for episode in episodes}, key=_arm_order):
        mine = [episode for episode in episodes if episode.arm == name]
        arms[name] = {
            direction: _direction_figures(results, traces, mine, direction, unsent)
            for direction in dict.fromkeys(flow.direction for flow in results.flows)
        }
        arms[name]["relocation_ms"] = _relocation_times(mine)
    return {"arms": arms, "controls": _controls(arms, [flow.direction for flow in results.flows])}


def _arm_order(arm: str) -> tuple[int, str]:
    """The noise floor first, then make-before-break, then what it is compared with."""
    known = (CONTROL_ARM, "mbb", NEGATIVE_CONTROL_ARM)
    return (known.index(arm) if arm in known else len(known), arm)


def samples_of(
    results: ResultFolder, traces: dict[int, Trace], episodes: list[Episode], direction: str
) -> list[Sample]:
    """The flows of a direction in the episodes of their UE."""
    return [
        Sample(episode, flow.id, window, interruption(trace, window, results.interval_ns))
        for episode in episodes
        for flow in results.flows
        if flow.direction == direction and flow.ue == episode.ue
        for trace in (traces[flow.id],)
        for window in (trace.window(episode.start_ns, episode.end_ns),)
    ]


def _direction_figures(
    results: ResultFolder,
    traces: dict[int, Trace],
    episodes: list[Episode],
    direction: str,
    unsent: Columns,
) -> dict[str, Any]:
    samples = samples_of(results, traces, episodes, direction)
    figures = [sample.figures for sample in samples]
    loss_ms = [each.loss_outage_ms for each in figures]
    gap_ms = [each.gap_outage_ms for each in figures]
    with_loss = {sample.episode.episode for sample in samples if sample.figures.lost}
    disagreeing = sum(each.outages_disagree(results.interval_ns) for each in figures)
    return {
        **{name: sum(getattr(each, name) for each in figures) for name in _TOTALS},
        "loss_outage_ms": _mean(loss_ms),
        "gap_outage_ms": _mean(gap_ms),
        "resolution_ms": results.interval_ns / 1e6,
        "relocations": len(episodes),
        "relocations_with_loss": len(with_loss),
        "any_loss_probability_ci95": binomial_interval(len(with_loss), len(episodes)),
        "loss_outage_ms_per_relocation": _spread(loss_ms, results.seed),
        "gap_outage_ms_per_relocation": _spread(gap_ms, results.seed),
        "outages_disagree": disagreeing > 0,
        "outages_disagree_count": disagreeing,
        "longest_loss_period_packets": max(
            (each.longest_loss_period_packets for each in figures), default=0
        ),
        "loss_distances": _distances([each.loss_distances for each in figures]),
        "received_by_anchor": _by_anchor(results.sites, traces, samples),
        "first_packet_at_target_ms": quantiles(_first_at_target_ms(results.sites, traces, samples)),
        "delay_us": _delays(traces, samples),
        "unsent": sum(_unsent(unsent, sample) for sample in samples),
        "bystander_lost": _bystander_lost(results, traces, episodes, direction),
    }


def _relocation_times(episodes: list[Episode]) -> dict[str, Any]:
    asked = [each for each in episodes if each.request_ns]
    total_ms = [(each.answered_ns - each.request_ns) / 1e6 for each in asked if each.answered_ns]
    phases = {
        name: quantiles(
            [
                (getattr(each, end) - getattr(each, begin)) / 1e6
                for each in asked
                if getattr(each, begin) and getattr(each, end)
            ]
        )
        for name, (begin, end) in _PHASES.items()
    }
    return {**quantiles(total_ms), "count": len(total_ms), "phases_ms": phases}


def _controls(arms: dict[str, Any], directions: list[str]) -> dict[str, Any]:
    """Whether the run could have seen a loss, and what it sees when nothing happens.

    Null where the run has no such arm.
    """
    names = list(dict.fromkeys(directions))

    def lost(arm: str) -> int:
        return sum(int(arms[arm][direction]["lost"]) for direction in names)

    return {
        "bbm_shows_loss": (
            all(arms[NEGATIVE_CONTROL_ARM][direction]["lost"] > 0 for direction in names)
            if NEGATIVE_CONTROL_ARM in arms
            else None
        ),
        "none_lost": lost(CONTROL_ARM) if CONTROL_ARM in arms else None,
    }


def _spread(values_ms: list[float], seed: int) -> dict[str, Any]:
    return {**quantiles(values_ms), "p50_ci95": median_interval(values_ms, seed)}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _distances(distances: list[NDArray[np.int64]]) -> dict[str, Any]:
    joined = np.concatenate([*distances, np.zeros(0, np.int64)])
    return {"count": len(joined), **quantiles(joined)}


def _by_anchor(sites: list[str], traces: dict[int, Trace], samples: list[Sample]) -> dict[str, int]:
    counts = np.zeros(256, np.int64)
    for sample in samples:
        trace, window = traces[sample.flow], sample.window
        counts += np.bincount(trace.site[window][~trace.lost[window]], minlength=256)
    return {name: int(counts[index]) for index, name in enumerate(sites) if counts[index]}


def _first_at_target_ms(
    sites: list[str], traces: dict[int, Trace], samples: list[Sample]
) -> list[float]:
    """From the request to the first packet that the target received, sent or echoed."""
    times = []
    for sample in samples:
        episode, trace = sample.episode, traces[sample.flow]
        if not episode.request_ns:
            continue
        at_target = trace.site[sample.window] == sites.index(episode.target)
        stamps = trace.recv_ns[sample.window][at_target]
        stamps = stamps[stamps >= episode.request_ns]
        if len(stamps):
            times.append((int(stamps.min()) - episode.request_ns) / 1e6)
    return times


def _delays(traces: dict[int, Trace], samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Delay of the packets sent before, during and after the relocation, in µs.

    During: from the request until everything is done (answered, kernel acknowledged, source of the
    downlink switched). Where nothing is relocated, all is before.
    """
    parts: dict[str, list[NDArray[np.int64]]] = {"before": [], "during": [], "after": []}
    for sample in samples:
        episode, trace, window = sample.episode, traces[sample.flow], sample.window
        arrived = ~trace.lost[window]
        send_ns = trace.send_ns[window][arrived]
        delay_ns = trace.delay_ns[window][arrived]
        done_ns = max(episode.answered_ns, episode.kernel_ack_ns, episode.switched_ns)
        begin, end = episode.request_ns or episode.end_ns, done_ns or episode.end_ns
        low, high = np.searchsorted(send_ns, [begin, end])
        for part, piece in zip(parts, np.split(delay_ns, [low, high]), strict=True):
            parts[part].append(piece)
    return {
        part: quantiles(np.concatenate([*pieces, np.zeros(0)]) / 1e3, ("p50", "p99"))
        for part, pieces in parts.items()
    }


def _unsent(unsent: Columns, sample: Sample) -> int:
    episode = sample.episode
    inside = (
        (unsent["flow"] == sample.flow)
        & (unsent["at_ns"] >= episode.start_ns)
        & (unsent["at_ns"] < episode.end_ns)
    )
    return int(unsent["count"][inside].sum())


def _bystander_lost(
    results: ResultFolder, traces: dict[int, Trace], episodes: list[Episode], direction: str
) -> int:
    lost = 0
    for flow in results.flows:
        if flow.direction != direction:
            continue
        trace = traces[flow.id]
        for episode in episodes:
            if episode.ue != flow.ue:
                window = trace.window(episode.start_ns, episode.end_ns)
                lost += int(np.count_nonzero(trace.lost[window]))
    return lost
