"""What a summary says, in sentences: the report's verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from scripts.analysis_relocation import CONTROL_ARM, NEGATIVE_CONTROL_ARM
from scripts.summary_table import DIRECTIONS, number

_ARM_NOTES = {
    CONTROL_ARM: "no relocation: the noise floor",
    "mbb": "make before break",
    NEGATIVE_CONTROL_ARM: "break before make: the negative control",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a verdict."""

    tone: Literal["good", "bad", "plain", "doubt"]
    subject: str
    text: str


def arm_note(arm: str) -> str:
    """What an arm is, in a few words; empty for arms this report does not know."""
    return _ARM_NOTES.get(arm, "")


def relocation_verdict(summary: dict[str, Any]) -> list[Finding]:
    """What each arm lost, then what limits the figures."""
    findings = [_arm(arm, figures, summary) for arm, figures in summary["arms"].items()]
    controls = summary["controls"]
    if controls["bbm_shows_loss"] is False:
        findings.append(
            Finding(
                "doubt",
                "blind",
                "Break before make lost nothing in some direction, where it must: there, that "
                "another arm lost nothing means nothing.",
            )
        )
    if controls["none_lost"]:
        findings.append(
            Finding(
                "doubt",
                "noise",
                f"{_count(controls['none_lost'], 'packet')} lost while nothing was relocated.",
            )
        )
    return findings + _probe(summary)


def expiry_verdict(summary: dict[str, Any]) -> list[Finding]:
    """Whether a packet passed after a deadline, and how early the leases ended."""
    killed = summary["by_controller"]["killed"]
    overrun = summary["overrun_packets"]
    text = (
        f"{_count(overrun, 'packet')} received after the deadline over "
        f"{_count(summary['leases'], 'lease')}, in {summary['controller_killed']} of which the "
        f"controller was killed right after the grant ({killed['overrun_packets']:,} there)."
    )
    if overrun:
        text += f" The worst came {number(summary['overrun_ms_max'])} ms late."
    early = summary["early_ms"]
    return [
        Finding("bad" if overrun else "good", "overrun", text),
        Finding(
            "plain",
            "early",
            f"The last packet came {number(early['p50'])} ms before the deadline in the median "
            f"and {number(early['max'])} ms at most; one packet is "
            f"{number(summary['resolution_ms'])} ms.",
        ),
        *_probe(summary),
    ]


def _arm(arm: str, figures: dict[str, Any], summary: dict[str, Any]) -> Finding:
    rows = {name: figures[name] for name in DIRECTIONS if name in figures}
    repetitions = next(iter(rows.values()))["relocations"]
    lost = sum(row["lost"] for row in rows.values())
    sent = sum(row["sent"] for row in rows.values())
    duplicated = sum(row["duplicated"] for row in rows.values())
    reordered = sum(row["reordered"] for row in rows.values())
    what = "stretches without relocation" if arm == CONTROL_ARM else "relocations"
    resolution = f"resolution {number(1000 / summary['rate_pps'])} ms"
    others = f"{duplicated:,} duplicated, {reordered:,} reordered"
    if not lost:
        allows = max(row["any_loss_probability_ci95"][1] for row in rows.values())
        text = (
            f"0 of {sent:,} packets lost in {repetitions:,} {what} ({resolution}); {others}. "
            f"At 95 % confidence, at most {allows:.1%} of them lose anything in a direction."
        )
        return Finding("plain" if arm == CONTROL_ARM else "good", arm, text)
    outages = "; ".join(
        f"{name} {number(row['gap_outage_ms_per_relocation']['p50'])} ms "
        f"[{_interval(row['gap_outage_ms_per_relocation']['p50_ci95'])}], "
        f"loss in {row['relocations_with_loss']:,} of {row['relocations']:,}"
        for name, row in rows.items()
    )
    text = (
        f"{lost:,} of {sent:,} packets lost in {repetitions:,} {what}; {others}. "
        f"Median outage [95 % interval], {resolution}: {outages}."
    )
    return Finding("plain" if arm == NEGATIVE_CONTROL_ARM else "bad", arm, text)


def _probe(summary: dict[str, Any]) -> list[Finding]:
    return [Finding("doubt", "probe", f"{text}.") for text in summary["probe"]["problems"]]


def _interval(bounds: list[float]) -> str:
    return " to ".join(number(bound) for bound in bounds)


def _count(number_of: int, thing: str) -> str:
    return f"{number_of:,} {thing}" + ("" if number_of == 1 else "s")
