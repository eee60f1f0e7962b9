"""From a small made-up result folder to its summary, report and table."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from scripts.analysis import analyse
from scripts.records import (
    Episode,
    Lease,
    ResultFolderError,
    write_episodes,
    write_json,
    write_leases,
)
from scripts.report import build_report
from scripts.summary_table import render
from topologies.endpoints.probe_records import RECEIVED_SCHEMA, SENT_SCHEMA, UNSENT_SCHEMA

GOLDEN = Path(__file__).parent.parent / "golden"
T0 = 1_760_000_000_000_000_000
MS = 1_000_000
RATE_PPS = 1000
SITES = ["ue1", "ue2", "edge1", "edge2"]
DIRECTIONS = ("uplink", "downlink", "roundtrip")
FLOWS = [
    {"id": 3 * number + index, "ue": ue, "direction": direction}
    for number, ue in enumerate(("ue1", "ue2"))
    for index, direction in enumerate(DIRECTIONS)
]
PROBE = {
    "sender": {
        "timer_error_us": {"p50": 1.0, "p99": 20.0, "max": 300.0},
        "flows": [
            {"id": f["id"], "sent": 900, "achieved_rate_pps": 999.9}
            | {"missed_sends": 0, "send_errors": {}, "switches": []}
            for f in FLOWS
        ],
    },
    "receiver": {"overflow": [{"flow": 0, "site": "edge1", "dropped": 0}]}
    | {"malformed": 0, "unstamped": 0},
    "echo": {"overflow": [], "send_errors": {}},
    "clock_stepped": False,
}
EPISODE = Episode(
    episode=0,
    arm="none",
    ue="ue1",
    source="edge1",
    target="edge1",
    start_ns=T0,
    end_ns=T0 + 300 * MS,
)


def relocation(episode: int, arm: str, begin_ms: int, source: str, target: str) -> Episode:
    begin_ns = T0 + begin_ms * MS
    return Episode(
        episode=episode,
        arm=arm,
        ue="ue1",
        source=source,
        target=target,
        start_ns=begin_ns,
        end_ns=begin_ns + 300 * MS,
        request_ns=begin_ns + 100 * MS,
        prepared_ns=begin_ns + 102 * MS,
        committed_ns=begin_ns + 103 * MS,
        kernel_ack_ns=begin_ns + 105 * MS,
        answered_ns=begin_ns + 106 * MS,
        switched_ns=begin_ns + 105 * MS,
        epoch=episode,
    )


def write_packets(folder: Path, count: int, passes: Any, site_of: Any) -> None:
    """Every flow sends `count` packets; `passes` and `site_of` map send times to what happens."""
    sent, received = [], []
    for flow in FLOWS:
        number = int(str(flow["id"]))
        seq = np.arange(count)
        send_ns = T0 + seq * MS + 10_000 * number
        ones = np.ones(count, np.int64)
        site = site_of(send_ns, flow)
        sent.append((ones * number, seq, site, send_ns))
        got = passes(send_ns, flow)
        received.append((ones[got] * number, seq[got], site[got], send_ns[got] + 50_000))
    for name, schema, rows in (
        ("sent", SENT_SCHEMA, sent),
        ("received", RECEIVED_SCHEMA, received),
        ("unsent", UNSENT_SCHEMA, [tuple(np.zeros(0, np.int64) for _ in range(4))]),
    ):
        columns = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        arrays = [
            pa.array(column).cast(field.type) for column, field in zip(columns, schema, strict=True)
        ]
        pq.write_table(pa.table(arrays, schema=schema), folder / f"{name}.parquet")


def write_manifest(folder: Path, experiment: str) -> None:
    manifest = {
        "schema_version": 1,
        "experiment": experiment,
        "seed": 1,
        "rate_pps": RATE_PPS,
        "waiting_time_ms": 300,
        "sites": [{"name": name} for name in SITES],
        "flows": FLOWS,
        "kernel": "6.18",
        "features": {"netem": False},
    }
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "probe.json", PROBE)


@pytest.fixture
def relocations(tmp_path: Path) -> Path:
    """none from 0 ms, mbb from 300 ms, bbm from 600 ms; 20 ms lost in the last, nobody else."""

    def passes(send_ns: Any, flow: dict[str, Any]) -> Any:
        broken = (send_ns >= T0 + 703 * MS) & (send_ns < T0 + 723 * MS)
        return ~(broken & (flow["ue"] == "ue1"))

    def site_of(send_ns: Any, flow: dict[str, Any]) -> Any:
        moved = (send_ns >= T0 + 405 * MS) & (send_ns < T0 + 705 * MS) & (flow["ue"] == "ue1")
        return np.where(moved, SITES.index("edge2"), SITES.index("edge1"))

    write_packets(tmp_path, 900, passes, site_of)
    write_manifest(tmp_path, "relocation")
    write_episodes(
        tmp_path,
        [
            EPISODE,
            relocation(1, "mbb", 300, "edge1", "edge2"),
            relocation(2, "bbm", 600, "edge2", "edge1"),
        ],
    )
    return tmp_path


@pytest.fixture
def expiries(tmp_path: Path) -> Path:
    """Two leases of ue1; the second lets 3 packets a flow past its deadline."""
    first = Lease(
        lease=0,
        ue="ue1",
        lease_id="a",
        requested_ns=T0 + 50 * MS,
        kernel_ack_ns=T0 + 51 * MS,
        deadline_ns=T0 + 250 * MS,
        ttl_ms=200,
        controller_killed=False,
    )
    second = Lease(
        lease=1,
        ue="ue1",
        lease_id="b",
        requested_ns=T0 + 400 * MS,
        kernel_ack_ns=T0 + 401 * MS,
        deadline_ns=T0 + 600 * MS,
        ttl_ms=200,
        controller_killed=True,
        killed_ns=T0 + 402 * MS,
    )

    def passes(send_ns: Any, flow: dict[str, Any]) -> Any:
        in_first = (send_ns >= first.kernel_ack_ns) & (send_ns < first.deadline_ns - 4 * MS)
        in_second = (send_ns >= second.kernel_ack_ns) & (send_ns < second.deadline_ns + 3 * MS)
        return in_first | in_second

    write_packets(tmp_path, 700, passes, lambda send_ns, _: np.full(len(send_ns), 2))
    write_manifest(tmp_path, "expiry")
    write_leases(tmp_path, [first, second])
    return tmp_path


@pytest.mark.parametrize("experiment", ["relocations", "expiries"])
def test_summary_is_the_golden_one(experiment: str, request: pytest.FixtureRequest) -> None:
    """To renew the golden files after an intended change, set RENEW_GOLDEN=1."""
    folder: Path = request.getfixturevalue(experiment)
    summary = analyse(folder)
    golden = GOLDEN / f"summary-{experiment}.json"
    if os.environ.get("RENEW_GOLDEN"):
        shutil.copy(folder / "summary.json", golden)
    assert summary == json.loads(golden.read_text())
    assert (folder / "summary.json").read_text() == golden.read_text()


def test_relocation_figures(relocations: Path) -> None:
    arms = analyse(relocations)["arms"]
    for direction in DIRECTIONS:
        none, mbb, bbm = (arms[arm][direction] for arm in ("none", "mbb", "bbm"))
        assert (none["sent"], none["lost"], mbb["lost"], bbm["lost"]) == (300, 0, 0, 20)
        assert bbm["loss_outage_ms"] == bbm["gap_outage_ms"] == 20.0
        assert not bbm["outages_disagree"]
        assert bbm["bystander_lost"] == 0
        assert none["received_by_anchor"] == {"edge1": 300}
        assert mbb["received_by_anchor"] == {"edge1": 105, "edge2": 195}
        assert mbb["first_packet_at_target_ms"]["p50"] == pytest.approx(5.06, abs=0.02)
    assert arms["none"]["relocation_ms"]["count"] == 0
    assert arms["none"]["relocation_ms"]["p50"] is None
    assert arms["mbb"]["relocation_ms"]["p50"] == 6.0
    assert arms["mbb"]["relocation_ms"]["phases_ms"]["kernel"]["p50"] == 2.0


def test_expiry_figures(expiries: Path) -> None:
    summary = analyse(expiries)
    assert (summary["leases"], summary["controller_killed"]) == (2, 1)
    assert summary["by_controller"]["alive"]["overrun_packets"] == 0
    assert summary["by_controller"]["killed"]["overrun_packets"] == 3 * len(DIRECTIONS)
    assert summary["overrun_ms_max"] == pytest.approx(2.07)
    assert summary["by_controller"]["alive"]["early_ms_max"] == pytest.approx(4.95)


def test_an_unsound_probe_is_named(relocations: Path) -> None:
    stats = json.loads(json.dumps(PROBE))
    stats["receiver"]["overflow"][0]["dropped"] = 7
    write_json(relocations / "probe.json", stats)
    assert analyse(relocations)["probe"]["problems"] == [
        "7 datagrams were dropped by the probe's own sockets"
    ]


@pytest.mark.parametrize("experiment", ["relocations", "expiries"])
def test_report_stands_alone(experiment: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(experiment)
    analyse(folder)
    page = build_report(folder).read_text()
    assert page.count("<svg") == len(list((folder / "plots").glob("*.svg"))) > 1
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert not re.search(r"url\((?!#)", page)


@pytest.mark.parametrize("experiment", ["relocations", "expiries"])
def test_table_shows_the_loss(experiment: str, request: pytest.FixtureRequest) -> None:
    summary = analyse(request.getfixturevalue(experiment))
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render(summary))
    assert ("20.0" if experiment == "relocations" else "2.07") in captured.get()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultFolderError, match=r"manifest\.json: not there"):
        analyse(tmp_path)
