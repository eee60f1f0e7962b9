import ctypes
import faulthandler
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testbed_helpers import in_isolation, processes_with

from controlplane.configfile import parse_yaml
from topologies import lifecycle
from topologies.isolation import IsolationError, outer_pid, run_isolated, scratch_dir
from topologies.lifecycle import LifecycleError
from topologies.linux import process_start_ticks
from topologies.registry import sweep
from topologies.spec import TopologySpec

pytestmark = pytest.mark.testbed

SMALL = """\
name: small
ues: {count: 1}
gnbs:
  - {name: gnb1, downlink_mbps: 100, uplink_mbps: 100}
anchors:
  - {name: edge1, delay_ms: 1}
"""

RUN_A_NETWORK = f"""
import sys, time
from controlplane.configfile import parse_yaml
from topologies.isolation import run_isolated
from topologies.network import Network
from topologies.spec import TopologySpec

def main():
    with Network(parse_yaml({SMALL!r}, TopologySpec, "small")) as network:
        network.ues[0].popen(["sleep", "300"])
        print("ready", flush=True)
        time.sleep(300)
    return 0

sys.exit(run_isolated(main))
"""


def start_a_network(token: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN_A_NETWORK],
        env={**os.environ, "RUN_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until_gone(token: str) -> None:
    deadline = time.monotonic() + 5
    while left := processes_with(token):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)


def test_a_run_is_alone_with_its_processes_links_and_files() -> None:
    outside = os.getpid()

    def body() -> None:
        assert os.getpid() == 1
        assert outer_pid() != 1
        assert {entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()} == {"1"}
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
        with socket.create_server(("127.0.0.1", 0)) as server:  # lo is up
            socket.create_connection(server.getsockname()).close()
        (scratch_dir() / "mine").write_text("x")

    in_isolation(body)
    assert os.getpid() == outside
    assert not Path("/run/aipaging/scratch/mine").exists()
    assert process_start_ticks(os.getpid())
    # Later children of this process are born into its own PID namespace again.
    own = Path("/proc/self/ns")
    assert (own / "pid").readlink() == (own / "pid_for_children").readlink()


def test_there_is_no_scratch_outside() -> None:
    with pytest.raises(IsolationError, match="inside an isolated run"):
        scratch_dir()


@pytest.mark.parametrize(("leave", "status"), [(7, 7), (None, 0), ("a message", 1)])
def test_the_exit_status_is_passed_on(leave: object, status: int) -> None:
    def main() -> int:
        raise SystemExit(leave)

    assert run_isolated(lambda: 5) == 5
    assert run_isolated(main) == status


def test_a_death_by_signal_is_reported_as_a_shell_does() -> None:
    def fault() -> int:
        faulthandler.disable()
        return len(ctypes.string_at(0))

    assert run_isolated(fault) == 128 + signal.SIGSEGV


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unwind_the_run(number: int, tmp_path: Path) -> None:
    token = secrets.token_hex(8)
    script = f"""
import sys, time
from pathlib import Path
from topologies.isolation import run_isolated
def main():
    try:
        print("ready", flush=True)
        while True:  # a signal that comes just before a long sleep begins would not end it
            time.sleep(0.05)
    finally:
        Path({str(tmp_path / "unwound")!r}).write_text("yes")
sys.exit(run_isolated(main))
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "RUN_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    assert run.wait(20) == 128 + number
    assert (tmp_path / "unwound").exists()
    wait_until_gone(token)


def test_sigkill_at_any_moment_leaves_nothing() -> None:
    chance = random.Random(1)
    links = socket.if_nameindex()
    registered = sorted(Path("/run/aipaging").glob("*.json"))
    for _ in range(12):
        token = secrets.token_hex(8)
        run = start_a_network(token)
        time.sleep(chance.uniform(0, 2.0))
        run.kill()
        run.wait()
        wait_until_gone(token)
    assert socket.if_nameindex() == links
    assert sorted(Path("/run/aipaging").glob("*.json")) == registered


def test_sigkill_of_a_finished_network_leaves_nothing_and_the_next_one_works() -> None:
    for _ in range(2):
        token = secrets.token_hex(8)
        run = start_a_network(token)
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
        assert len(processes_with(token)) > 6
        run.kill()
        run.wait()
        wait_until_gone(token)


def small() -> TopologySpec:
    return parse_yaml(SMALL, TopologySpec, "small")


def test_up_shell_down(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        registration = lifecycle.up(small(), registry=tmp_path)
        assert registration.alive()
        assert any("10.45.0.1" in line for line in registration.describe())
        with pytest.raises(LifecycleError, match="is up already"):
            lifecycle.up(small(), registry=tmp_path)
        assert lifecycle.shell("ue1", ["cat", "/proc/net/dev"], tmp_path) == 0
        assert "radio-gnb1" in capfd.readouterr().out
        assert lifecycle.shell("ue1", ["sh", "-c", "exit 9"], tmp_path) == 9
        assert lifecycle.shell("ue1", ["no-such-program"], tmp_path) == 127
        with pytest.raises(LifecycleError, match="no host ue2"):
            lifecycle.shell("ue2", ["true"], tmp_path)
    finally:
        stopped = lifecycle.down(tmp_path)
    assert [run.run_id for run in stopped] == [registration.run_id]
    assert not registration.alive()
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(LifecycleError, match="no network is up"):
        lifecycle.shell("ue1", ["true"], tmp_path)


def test_what_was_killed_is_swept_and_no_stranger_is_touched(tmp_path: Path) -> None:
    registration = lifecycle.up(small(), registry=tmp_path)
    try:
        # The same registration with another start time stands for a reused pid.
        reused = registration.model_copy(update={"start_ticks": registration.start_ticks + 1})
        (tmp_path / "reused.json").write_text(reused.model_dump_json())
        assert [run.run_id for run in sweep(tmp_path)] == [registration.run_id]
        assert not (tmp_path / "reused.json").exists()
        os.kill(registration.pid, signal.SIGKILL)
        os.waitpid(registration.pid, 0)
        assert sweep(tmp_path) == []
        assert not list(tmp_path.glob("*.json"))
    finally:
        lifecycle.down(tmp_path)


def test_a_network_that_cannot_be_built_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topologies.delay.netem_missing", lambda: "no netem")
    monkeypatch.setattr("topologies.delay.relay_missing", lambda: "no packet sockets")
    with pytest.raises(LifecycleError, match="no netem; no packet sockets"):
        lifecycle.up(small(), registry=tmp_path)
    assert not list(tmp_path.glob("*.json"))
