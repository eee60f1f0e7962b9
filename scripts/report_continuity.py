"""The report's page on a continuity run."""

from __future__ import annotations

from typing import Any

from scripts import plots_continuity
from scripts.analysis_continuity import ALL, Stream, streams_of
from scripts.analysis_relocation import CONTROL_ARM, NEGATIVE_CONTROL_ARM
from scripts.records import PLOTS_FOLDER, ResultFolder
from scripts.report_words import Finding
from scripts.summary_table import number

TIMELINE_ARMS = ("drain", NEGATIVE_CONTROL_ARM)


def continuity_plots(results: ResultFolder) -> list[str]:
    """Draw; return the names of the plots."""
    streams = streams_of(results)
    folder = results.path / PLOTS_FOLDER
    names = []
    for arm in TIMELINE_ARMS:
        mine = [stream for stream in streams if stream.episode.arm == arm]
        if mine:
            names.append(f"timeline-{arm}")
            plots_continuity.timeline(folder / f"timeline-{arm}.svg", _one_episode(mine))
    drained = [stream for stream in streams if stream.episode.arm == "drain"]
    if drained:
        names.append("moved")
        plots_continuity.moved(folder / "moved.svg", drained)
    return names


def _one_episode(streams: list[Stream]) -> list[Stream]:
    """The episode in the middle, by how long it took."""
    episodes = {stream.episode.episode: stream.episode for stream in streams}
    ordered = sorted(episodes.values(), key=lambda each: each.end_ns - each.start_ns)
    chosen = ordered[len(ordered) // 2].episode
    return [stream for stream in streams if stream.episode.episode == chosen]


def continuity_verdict(summary: dict[str, Any]) -> list[Finding]:
    """What each arm broke, and how long clients stayed."""
    findings = []
    for arm, figures in summary["arms"].items():
        row = figures[ALL]
        tokens = row["tokens_lost"] + row["tokens_repeated"] + row["tokens_reordered"]
        where = f"in {row['relocations']:,} relocations" if row["relocations"] else "undisturbed"
        text = (
            f"{row['failed']:,} of {row['requests']:,} requests failed {where} "
            f"({row['reset']:,} by a reset or an early close; {row['crossing']:,} were under way "
            f"at the flip). Of {row['tokens']:,} tokens {row['tokens_lost']:,} were lost, "
            f"{row['tokens_repeated']:,} repeated, {row['tokens_reordered']:,} reordered; longest "
            f"stall {number(row['longest_stall_ms']['max'])} ms."
        )
        sound = not row["failed"] and not tokens
        tone = "plain" if arm in (CONTROL_ARM, NEGATIVE_CONTROL_ARM) else "good" if sound else "bad"
        findings.append(Finding(tone, arm, text))  # type: ignore[arg-type]
    if drain := summary["arms"].get("drain"):
        moved = drain[ALL]["moved_after_ms"]
        p50, p99, most = (number(moved[name]) for name in ("p50", "p99", "max"))
        text = (
            f"The last stream from the old anchor ended {p50} ms after the flip in the median, "
            f"{p99} ms at the 99th percentile, {most} ms at most: no drain deadline below that "
            "lets every client move by itself."
        )
        findings.append(Finding("plain", "moved", text))
    return findings + [Finding("doubt", "control", f"{each}.") for each in summary["problems"]]
