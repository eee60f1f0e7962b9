"""The benchmarks measure what they say: documented keys, exact counts, sane values."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from plane import packet_queue

from scripts.bench import commands, install, lease_memory, waiting
from scripts.bench.chain import sides
from scripts.bench.switching import methods, programs
from upf.features import probe

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: new network namespaces"),
]

ROUNDS = 3
INSTALL_ROUNDS = 2
TINY = (
    "--leases 120 --anchors 3 --anchor-leases 12 --rounds 3 --seconds-per-arm 0.01 "
    "--install-rounds 2 --expiring 50 --expiries 1 --expiry-lead 0.2 "
    "--expiry-rate 20000 --switches 2 --method lease --method nft_two_calls --method haproxy "
    "--part install --part forwarding --part mass-expiry --part switch"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny run of all but memory, on a machine without HAProxy."""
    path = tmp_path_factory.mktemp("user-plane") / "made" / "user-plane.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Haproxy, "tools", (methods.Tool("no-such-program", "haproxy", ()),))
        arguments = ["user-plane", "--json", str(path), *TINY.split()]
        result = CliRunner().invoke(commands.group, arguments)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def figures(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written.read_text())
    return found


@pytest.fixture(scope="module")
def installed(figures: dict[str, Any]) -> dict[str, Any]:
    return figures["install"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def forwarded(figures: dict[str, Any]) -> dict[str, Any]:
    return figures["forwarding"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("packed_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("packed_dual_stack_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("encode_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("gate_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("socket_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("gate_dual_stack_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("renew_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("move_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("revoke_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("pyroute2_us", INSTALL_ROUNDS * install.TURN_CALLS),
        ("gate_batch_us_per_element", 1),
        ("packed_batch_us_per_element", 1),
        ("pyroute2_batch_us_per_element", 1),
    ],
)
def test_install_figures(installed: dict[str, Any], name: str, count: int) -> None:
    for found in (installed, installed["by_live_leases"]["120"]):
        values = found[name]
        assert values["count"] == count
        assert 0 < values["p50"] <= values["p90"] <= values["p99"]


def test_the_command_line_is_measured_or_said_to_be_missing(installed: dict[str, Any]) -> None:
    if shutil.which("nft"):
        assert installed["nft_cli_us"]["p50"] > 0
        assert installed["ratios"]["nft_cli_to_packed"] > 0
    else:
        assert "nft_cli_us" not in installed
        assert "skipped" in installed["nft_cli"]


def test_ratios_are_of_medians(installed: dict[str, Any]) -> None:
    expected = installed["pyroute2_us"]["p50"] / installed["packed_us"]["p50"]
    assert installed["ratios"]["pyroute2_to_packed"] == pytest.approx(expected)


@pytest.mark.parametrize("leases", ["120", "3_anchors"])
def test_forwarding_ratio(forwarded: dict[str, Any], leases: str) -> None:
    for ratio in (forwarded["ratio"][leases], forwarded["ratio_ipv6"][leases]):
        assert ratio["count"] == ROUNDS
        low, high = ratio["ci95"]
        assert low <= ratio["p50"] <= high
        assert 0.1 < ratio["p50"] < 10  # what it is other work decides, too


def test_every_packet_is_accounted_for(forwarded: dict[str, Any]) -> None:
    assert forwarded["dropped_by_gate_packets"] == 0
    assert forwarded["flows_without_packets"] == {"120": 0, "120_marked": 0, "3_anchors": 0}
    for families in forwarded["by_live_leases"].values():
        for directions in families.values():
            assert set(directions) == {"uplink", "downlink"}
            for found in directions.values():
                assert set(found["arms"]) == {"plain", "plain_again", "steered"}
                for arm in found["arms"].values():
                    assert arm["sent"] == arm["received"] + arm["lost"]
                    assert arm["received"] > 0


def test_the_file_says_what_it_is(written: Path, figures: dict[str, Any]) -> None:
    assert figures["benchmark"] == "user-plane"
    assert figures["machine"]["kernel"] == os.uname().release
    assert {"software", "options", "seed", "schema_version"} <= set(figures)
    for part in ("install", "forwarding", "mass_expiry", "switching"):
        assert figures[part]["method"]
    assert "<svg" in written.with_suffix(".svg").read_text()


def test_what_stands_at_the_top(figures: dict[str, Any]) -> None:
    assert figures["forwarding_ratio"] == figures["forwarding"]["ratio"]
    assert list(figures["install_us"]) == ["100", "120"]
    for live, found in figures["install_us"].items():
        assert found == figures["install"]["by_live_leases"][live]["gate_us"]
    directions = figures["forwarding"]["by_live_leases"]["120"].values()
    ratios = [found["ratio"]["p50"] for family in directions for found in family.values()]
    assert len(ratios) == 4
    assert figures["forwarding_ratio_lowest"]["120"] == min(ratios)


def test_memory() -> None:
    """Enough leases to be seen above what else happens on the machine."""
    found = lease_memory.measure(leases=10_000, settle_s=0.1, features=probe())
    for family, least in (("ipv4", 300), ("dual_stack", 600)):
        assert least < found[family]["kernel_bytes_per_lease"] < 5_000
        assert 200 < found[family]["process_bytes_per_lease"] < 5_000


def test_leases_that_end_at_once(figures: dict[str, Any]) -> None:
    found = figures["mass_expiry"]
    assert found["lost"] == found["overrun_packets"] == 0
    assert not found["blind"]
    assert found["controls"]["late_by_50_ms"]["overrun_packets"] > 20
    assert found["controls"]["other_lease_revoked"]["lost"] > 0
    for run in found["runs"]:
        assert run["ending_received_in_time"] > 200
        assert run["ending_refused"] > 200


def test_switches(figures: dict[str, Any]) -> None:
    assert figures["switching"]["skipped"] == {
        "haproxy": "no no-such-program: apt-get install haproxy"
    }
    assert set(figures["switch"]) == {"none", "lease", "nft_two_calls"}
    for method in figures["switch"].values():
        assert {"lost", "outage_ms", "version", "settings", "guarantees"} <= set(method)
        for traffic in ("datagrams", "requests"):
            assert method[traffic]["switches"] == 2
    lease, control = figures["switch"]["lease"], figures["switch"]["nft_two_calls"]
    assert lease["lost"] == lease["requests"]["lost"] == 0
    assert lease["datagrams"]["first_at_new_ms"]["max"] < 50
    assert lease["requests"]["first_at_new_ms"] is not None
    assert control["lost"] > 0
    assert control["datagrams"]["quiet_lost"] == 0 < control["datagrams"]["quiet_sent"]
    assert control["outage_ms"]["p50"] == pytest.approx(
        control["datagrams"]["loss_outage_ms"]["p50"], abs=0.2
    )
    assert not figures["switching"]["blind"]


@pytest.mark.parametrize("leases", ["0", "many", "1,1000000"])
def test_impossible_numbers_of_leases(leases: str) -> None:
    arguments = ["user-plane", "--json", "x.json", "--leases", leases]
    assert CliRunner().invoke(commands.group, arguments).exit_code == 2


@pytest.mark.parametrize(("leases", "expected"), [(1, (1, 1)), (300, (15, 20)), (7, (1, 7))])
def test_sides(leases: int, expected: tuple[int, int]) -> None:
    assert sides(leases) == expected


def test_control_figures(tmp_path: Path) -> None:
    """A tiny run of all of it: the documented keys are there, and what adds up does."""
    path = tmp_path / "control.json"
    disk = Path(__file__).parent  # temporary folders may be in memory
    sizes = ["--rounds", "1", "--pages", "100", "--sessions", "200", "--concurrency", "32"]
    more = ["--rate", "400", "--entries", "1500", "--tree", "1000", "--disk", str(disk)]
    result = CliRunner().invoke(
        commands.group, ["control", "--json", str(path), *sizes, *more], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["http_page_ms"]["count"] == 100
    assert 0 < found["http_page_ms"]["p50"] <= found["http_page_ms"]["p99"]
    for name in (
        "http_pages_per_s",
        "http_page_release_pairs_per_s",
        "http_cpu_us_per_page",
        "inprocess_pages_per_s",
        "evidence_entries_per_s",
        "evidence_entries_verified_per_s",
        "proofs_verified_per_s",
        "memory_bytes_per_session",
    ):
        assert found[name] > 0, name
    assert 300 < found["evidence_bytes_per_entry"] < 1_000
    assert found["evidence_entries"] >= 1_500
    assert found["proof_bytes"] == 10 * 32
    assert 1 < found["inprocess"]["pages_per_batch"] <= 32
    assert all(us > 0 for us in found["parts_us_per_page"].values())
    assert found["filesystem"] not in ("tmpfs", "unknown")
    assert not list(disk.glob(".bench-*"))


def test_what_waits_arrives_and_what_does_not_wait_is_lost(tmp_path: Path) -> None:
    if packet_queue() is None:
        pytest.skip("the kernel has no NFQUEUE")
    figures = waiting.measure(
        disk=tmp_path, count=3, version=4, rate_pps=500, late_ms=20, careless_ms=50, seed=1
    )
    for arm in ("first_packet", "buffer"):
        assert (figures[arm]["lost"], figures[arm]["duplicated"]) == (0, 0), arm
    assert figures["first_packet"]["first_ms"]["p50"] > figures["first_packet"]["last_ms"]["p50"]
    assert figures["buffer"]["wait_ms"]["p50"] > figures["buffer"]["delay_ms"]["p50"]
    assert figures["unheld"]["lost"] > 0  # the control
    assert figures["parked"]["adds_up"]
    assert figures["parked"]["stored"] > 0
