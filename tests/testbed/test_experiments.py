"""The main jobs end to end, through the command line: small runs of what users run."""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from testbed_helpers import processes_with

pytestmark = pytest.mark.testbed

AIPAGING = [sys.executable, "-m", "scripts.cli"]
DIRECTIONS = ("uplink", "downlink", "roundtrip")
DEADLINE_S = 120
# How often the run is killed; the figure of 50 was taken with KILLS=50.
KILLS = int(os.environ.get("AIPAGING_TEST_KILLS", "4"))


def aipaging(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*AIPAGING, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.parametrize(
    ("topology", "ip"), [("two-edge", 4), ("two-edge", 6), ("two-edge-far", 4)]
)
def test_make_before_break_loses_nothing_and_break_before_make_does(
    tmp_path: Path, topology: str, ip: int
) -> None:
    out = tmp_path / "run"
    shown = aipaging(
        *("run", "relocation", "--topology", topology, "--ip", ip, "--relocations", 4),
        *("--rate", 500, "--out", out),
    )
    assert str(out / "report.html") in shown.stdout
    arms = summary_of(out)["arms"]
    for direction in DIRECTIONS:
        for arm in ("none", "mbb"):
            figures = arms[arm][direction]
            assert figures["sent"] > 400
            assert (figures["lost"], figures["duplicated"]) == (0, 0), (arm, direction)
        assert arms["bbm"][direction]["lost"] > 0, direction  # else the measurement is blind
        assert arms["bbm"][direction]["bystander_lost"] == 0
        assert arms["mbb"][direction]["resolution_ms"] == 2.0
    assert arms["mbb"]["relocation_ms"]["count"] == 4
    assert arms["mbb"]["relocation_ms"]["p50"] > 0

    # Summary and report come from the raw records alone.
    before = summary_of(out)
    for made in ("summary.json", "report.html"):
        (out / made).unlink()
    aipaging("report", out)
    assert summary_of(out) == before
    report = (out / "report.html").read_text()
    assert "<svg" in report
    assert 'src="http' not in report
    assert 'href="http' not in report

    manifest = json.loads((out / "manifest.json").read_text())
    for member in ("seed", "options", "topology", "features", "network", "sysctls", "software"):
        assert manifest[member] is not None
    # A third party can check what was granted; one changed character is found and named.
    log = out / "evidence.jsonl"
    aipaging("evidence", "verify", log)
    log.write_text(log.read_text().replace('"epoch":2', '"epoch":3', 1))
    assert "entry" in aipaging("evidence", "verify", log, status=1).stdout


def test_a_handover_with_both_links_up_loses_nothing_and_a_gap_does(tmp_path: Path) -> None:
    out = tmp_path / "run"
    aipaging(
        *("run", "handover", "--relocations", 4, "--rate", 500, "--ues", 1),
        *("--gap-ms", 40, "--out", out),
    )
    arms = summary_of(out)["arms"]
    for direction in DIRECTIONS:
        for arm in ("none", "mbb"):
            assert arms[arm][direction]["lost"] == 0, (arm, direction)
        assert (
            arms["bbm"][direction]["lost"] >= 4 * 40 * 0.9 / arms["bbm"][direction]["resolution_ms"]
        )
    aipaging("evidence", "verify", out / "evidence.jsonl")


def test_clients_of_a_draining_anchor_move_by_themselves_and_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    aipaging(
        *("run", "continuity", "--arms", "drain,bbm", "--relocations", 2, "--requests", 5),
        *("--out", out),
    )
    arms = summary_of(out)["arms"]
    clients = set(arms["drain"]) - {"all"}
    assert len(clients) == 5
    for client in clients:
        row = arms["drain"][client]
        assert (row["requests"], row["tokens"]) == (10, 100)
        for what in ("failed", "tokens_lost", "tokens_repeated", "tokens_reordered"):
            assert row[what] == 0, (client, what)
        assert row["crossing"] > 0
        assert row["connections"]["requests_on_kept"] > 0
        assert set(row["served_by"]) == {"edge1", "edge2"}
        assert 0 < row["moved_after_ms"]["max"] < 2_000
        assert arms["bbm"][client]["failed"] > 0  # else the measurement is blind

    before = summary_of(out)
    for made in ("summary.json", "report.html"):
        (out / made).unlink()
    aipaging("report", out)
    assert summary_of(out) == before
    assert "<svg" in (out / "report.html").read_text()


def test_nothing_passes_after_a_lease_with_the_controller_dead_in_half(tmp_path: Path) -> None:
    out = tmp_path / "run"
    aipaging("run", "expiry", "--leases", 8, "--ues", 4, "--rate", 1000, "--out", out)
    summary = summary_of(out)
    assert (summary["leases"], summary["controller_killed"]) == (8, 4)
    assert (summary["overrun_packets"], summary["overrun_ms_max"]) == (0, 0)
    assert 0 < summary["early_ms_max"] < 50
    aipaging("evidence", "verify", out / "evidence.jsonl")


def test_sigkill_of_a_run_at_any_moment_leaves_nothing_and_the_next_one_works(
    tmp_path: Path,
) -> None:
    moments = random.Random(2)
    before = own_links()
    for number in range(KILLS):
        token = secrets.token_hex(8)
        run = subprocess.Popen(
            [
                *AIPAGING,
                *("run", "relocation", "--relocations", "8", "--rate", "500"),
                *("--out", str(tmp_path / f"killed-{number}")),
            ],
            env={**os.environ, "RUN_TOKEN": token},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.1, 9.0))
        run.send_signal(signal.SIGKILL)
        run.wait()
        until = time.monotonic() + 10
        while left := processes_with(token):
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(0.01)
        assert own_links() == before
    out = tmp_path / "next"
    aipaging("run", "relocation", "--relocations", 1, "--rate", 200, "--out", out)
    assert summary_of(out)["arms"]["mbb"]["uplink"]["lost"] == 0


def own_links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_an_interrupted_run_says_so_and_ends(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*AIPAGING, "run", "relocation", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(4)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "Traceback" not in errors


def test_bad_input_is_named_and_makes_nothing(tmp_path: Path) -> None:
    topology = tmp_path / "mine.yaml"
    topology.write_text("name: mine\nues: {count: 1}\ngnbs: []\nedges: []\n")
    out = tmp_path / "run"
    shown = aipaging("run", "relocation", "--topology", topology, "--out", out, status=2)
    assert f"{topology}:4: unknown key edges" in shown.stderr
    assert f"{topology}:3: gnbs" in shown.stderr
    shown = aipaging("run", "relocation", "--between", "edge1,moon", "--out", out, status=2)
    assert "moon is no anchor" in shown.stderr
    assert not out.exists()
    out.mkdir()
    (out / "precious").touch()
    shown = aipaging("run", "relocation", "--out", out, status=2)
    assert "not empty" in shown.stderr


def test_qos_flows_are_kept_to_and_without_qos_they_are_not(tmp_path: Path) -> None:
    """The control must not keep what is promised nobody, or the measurement is blind.

    Whether the delay budget is kept is for a quiet machine to say; here it is compared.
    """
    out = tmp_path / "run"
    shown = aipaging("run", "qos", "--seconds", 2, "--out", out)
    assert str(out / "report.html") in shown.stdout
    assert "Rates over time" in (out / "report.html").read_text()
    arms = summary_of(out)["arms"]
    for direction in ("downlink", "uplink"):
        kept, control = arms["qos"][direction], arms["none"][direction]
        steady, excessive, small = kept["flows"].values()
        assert steady["lost"] == small["lost"] == 0
        assert steady["rate_to_gfbr"] >= 0.98 * min(1, steady["offered_bps"] / 20e6)
        assert 0.98 * 20 / 24 < excessive["rate_to_mfbr_max"] <= 1.02
        assert kept["best_effort"]["share_of_rest"] > 0.8
        assert not any(flow["kept"] for flow in control["flows"].values())
        assert small["delay_ms"]["p99"] < control["flows"]["5QI 80"]["delay_ms"]["p50"]
