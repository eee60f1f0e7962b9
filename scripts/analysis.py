"""From raw records to `summary.json`: a pure function of the result folder.

The experiments differ in what surrounds the packets (relocations or leases); what is common to
them, the flows' traces and the health of the probe, is here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from scripts.analysis_continuity import continuity_summary
from scripts.analysis_expiry import expiry_summary
from scripts.analysis_qos import qos_summary
from scripts.analysis_relocation import relocation_summary
from scripts.interruption import Trace, build_trace
from scripts.records import SUMMARY_FILE, ResultFolder, ResultFolderError, write_json

SCHEMA_VERSION = 1


def analyse(folder: Path) -> dict[str, Any]:
    """Analyse a result folder; writes `summary.json` there and returns what it holds."""
    results = ResultFolder(folder)
    head = {
        "schema_version": SCHEMA_VERSION,
        "experiment": results.experiment,
        "seed": results.seed,
    }
    match results.experiment:
        case "relocation" | "handover":
            figures = relocation_summary(results, build_traces(results))
        case "expiry":
            figures = expiry_summary(results, build_traces(results))
        case "continuity":
            figures = continuity_summary(results)
        case "qos":
            figures = qos_summary(results)
        case unknown:
            raise ResultFolderError(f"{folder}: no analysis for experiment {unknown!r}")
    if results.flows:
        head |= {"rate_pps": results.rate_pps, "waiting_time_ms": results.waiting_time_ms}
        figures["probe"] = probe_health(results.probe())
    summary: dict[str, Any] = _null_for_nan({**head, **figures})
    write_json(folder / SUMMARY_FILE, summary)
    return summary


def build_traces(results: ResultFolder) -> dict[int, Trace]:
    """Every flow's trace, by flow id."""
    sent, received = results.sent(), results.received()
    traces = {}
    for flow in results.flows:
        mine = sent["flow"] == flow.id
        send_ns = np.zeros(int(np.count_nonzero(mine)), np.int64)
        send_ns[sent["seq"][mine]] = sent["send_ns"][mine]
        got = received["flow"] == flow.id
        traces[flow.id] = build_trace(
            send_ns,
            received["seq"][got],
            received["site"][got],
            received["recv_ns"][got],
            results.waiting_time_ms,
        )
    return traces


def probe_health(stats: dict[str, Any]) -> dict[str, Any]:
    """How far the probe itself can be trusted, from `probe.json`.

    `problems` says in words what casts doubt on the figures; it is empty for a sound run.
    """
    flows = stats["sender"]["flows"]
    sockets = stats["receiver"]["overflow"] + stats["echo"]["overflow"]
    sent = sum(flow["sent"] for flow in flows)
    missed = sum(flow["missed_sends"] for flow in flows)
    health = {
        "achieved_rate_pps_min": min(flow["achieved_rate_pps"] for flow in flows),
        "timer_error_us": stats["sender"]["timer_error_us"],
        "missed_sends": missed,
        "missed_sends_share": missed / max(1, missed + sent),
        "send_errors": sum(sum(flow["send_errors"].values()) for flow in flows),
        "echo_send_errors": sum(stats["echo"]["send_errors"].values()),
        "overflow": sum(entry["dropped"] for entry in sockets),
        "malformed": stats["receiver"]["malformed"],
        "unstamped": stats["receiver"]["unstamped"],
        "clock_stepped": stats["clock_stepped"],
    }
    doubts = {
        f"{health['overflow']} datagrams were dropped by the probe's own sockets": "overflow",
        f"{health['unstamped']} datagrams came without a kernel stamp": "unstamped",
        f"{health['send_errors']} packets could not be sent": "send_errors",
        f"{health['echo_send_errors']} echoes could not be sent": "echo_send_errors",
        "the clock was stepped during the run": "clock_stepped",
    }
    problems = [text for text, key in doubts.items() if health[key]]
    if health["missed_sends_share"] > 0.01:
        problems.append(f"{health['missed_sends_share']:.1%} of the packets were never sent")
    return {**health, "problems": problems}


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value
