"""The report of a run: plots and one self-contained HTML page, built from the result folder.

Nothing is measured here: figures come from `summary.json`, which must be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from scripts import plots, plots_timeline
from scripts.analysis import build_traces
from scripts.analysis_expiry import lease_ends
from scripts.analysis_relocation import samples_of
from scripts.interruption import Trace
from scripts.records import PLOTS_FOLDER, REPORT_FILE, Episode, ResultFolder
from scripts.report_continuity import continuity_plots, continuity_verdict
from scripts.report_qos import qos_page
from scripts.report_words import arm_note, expiry_verdict, relocation_verdict
from scripts.summary_table import DIRECTIONS, number

TIMELINE_ARMS = ("mbb", "bbm")
_BULKY = ("sites", "flows")


def build_report(folder: Path) -> Path:
    """Write the plots and `report.html` of an analysed result folder; returns the page's path."""
    results = ResultFolder(folder)
    summary = results.summary()
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    template = "report.html.j2"
    if results.experiment == "continuity":
        template = "report_continuity.html.j2"
        context = _continuity_page(results, summary)
    elif results.experiment == "qos":
        template = "report_qos.html.j2"
        context = qos_page(results, summary, folder / PLOTS_FOLDER)
        context["svg"] = {"rates": _inline(folder / PLOTS_FOLDER / "rates.svg")}
    else:
        build = _expiry_page if results.experiment == "expiry" else _relocation_page
        context = {
            **build(results, build_traces(results), summary),
            "experiment": results.experiment,
            "health": summary["probe"],
            "directions": [name for name in DIRECTIONS if name in _directions(results)],
        }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = number
    page = environment.get_template(template).render(
        summary=summary, manifest=_manifest_rows(results.manifest), **context
    )
    path = folder / REPORT_FILE
    path.write_text(page)
    return path


def _relocation_page(
    results: ResultFolder, traces: dict[int, Trace], summary: dict[str, Any]
) -> dict[str, Any]:
    episodes = results.episodes()
    folder = results.path / PLOTS_FOLDER
    plots.outages(folder / "outages.svg", results, traces, episodes)
    plots.relocation_times(folder / "relocation-times.svg", episodes, summary)
    plots.delays(folder / "delays.svg", summary)
    shown = {
        arm: typical_episode(results, traces, [each for each in episodes if each.arm == arm])
        for arm in TIMELINE_ARMS
        if arm in summary["arms"]
    }
    spans = [
        plots_timeline.span_ms(each, _last_loss_ms(results, traces, each))
        for each in shown.values()
    ]
    if spans:
        limits_ms = min(low for low, _ in spans), max(high for _, high in spans)
        for arm, each in shown.items():
            path = folder / f"timeline-{arm}.svg"
            plots_timeline.relocation(path, results, traces, each, limits_ms)
    return {
        "title": "Relocation",
        "verdict": relocation_verdict(summary),
        "timelines": [
            {
                "arm": arm,
                "note": arm_note(arm),
                "caption": f"{each.ue} from {each.source} to {each.target}, episode {each.episode}",
                "svg": _inline(folder / f"timeline-{arm}.svg"),
            }
            for arm, each in shown.items()
        ],
        "arm_notes": {arm: arm_note(arm) for arm in summary["arms"]},
        "svg": {name: _inline(folder / f"{name}.svg") for name in _RELOCATION_PLOTS},
    }


_RELOCATION_PLOTS = ("outages", "relocation-times", "delays")


def _expiry_page(
    results: ResultFolder, traces: dict[int, Trace], summary: dict[str, Any]
) -> dict[str, Any]:
    folder = results.path / PLOTS_FOLDER
    ends = lease_ends(results, traces)
    plots.lease_ends(folder / "lease-ends.svg", ends)
    leases = results.leases()
    chosen = [lease for lease in leases if lease.controller_killed] or leases
    one = sorted(chosen, key=lambda lease: lease.ttl_ms)[len(chosen) // 2]
    plots_timeline.lease(folder / "timeline-lease.svg", results, traces, one)
    return {
        "title": "Expiry",
        "verdict": expiry_verdict(summary),
        "timelines": [
            {
                "arm": "lease",
                "note": "controller killed" if one.controller_killed else "controller alive",
                "caption": f"lease {one.lease} of {one.ue}, granted for {one.ttl_ms} ms",
                "svg": _inline(folder / "timeline-lease.svg"),
            }
        ],
        "svg": {"lease-ends": _inline(folder / "lease-ends.svg")},
    }


def _continuity_page(results: ResultFolder, summary: dict[str, Any]) -> dict[str, Any]:
    drawn = continuity_plots(results)
    return {
        "title": "Continuity",
        "verdict": continuity_verdict(summary),
        "svg": {name: _inline(results.path / PLOTS_FOLDER / f"{name}.svg") for name in drawn},
    }


def typical_episode(
    results: ResultFolder, traces: dict[int, Trace], episodes: Sequence[Episode]
) -> Episode:
    """The episode in the middle, by packets lost and then by relocation time."""

    def rank(episode: Episode) -> tuple[int, int]:
        lost = sum(
            sample.figures.lost
            for direction in _directions(results)
            for sample in samples_of(results, traces, [episode], direction)
        )
        return lost, episode.answered_ns - episode.request_ns

    return sorted(episodes, key=rank)[len(episodes) // 2]


def _last_loss_ms(results: ResultFolder, traces: dict[int, Trace], episode: Episode) -> float:
    """When the episode's last lost packet was sent, after the request; 0 if none was lost."""
    last_ns = episode.request_ns
    for flow in results.flows:
        if flow.ue == episode.ue:
            trace = traces[flow.id]
            window = trace.window(episode.start_ns, episode.end_ns)
            lost_ns = trace.send_ns[window][trace.lost[window]]
            last_ns = max(last_ns, int(np.max(lost_ns, initial=0)))
    return (last_ns - episode.request_ns) / 1e6


def _directions(results: ResultFolder) -> list[str]:
    return list(dict.fromkeys(flow.direction for flow in results.flows))


def _manifest_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in manifest.items():
        if key in _BULKY:
            rows.append((key, f"{len(value)}"))
        elif isinstance(value, dict | list):
            rows.append((key, json.dumps(value, indent=1, ensure_ascii=False)))
        else:
            rows.append((key, str(value)))
    return rows


def _inline(path: Path) -> Markup:
    """An SVG file's element alone, scalable: without XML declaration, DOCTYPE and fixed size."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Markup(head + ' role="img">' + rest)
