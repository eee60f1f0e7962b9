"""Hands-on use through the command line: up, shell, page, watch, relocate, drain, down."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from topologies.registry import sweep

pytestmark = pytest.mark.testbed

AIPAGING = [sys.executable, "-m", "scripts.cli"]
PAGE = ("shell", "ue1", "--", *AIPAGING, "page", "--task", "text-generation", "--max-tokens")


def aipaging(*arguments: str, status: int = 0) -> str:
    command = [*AIPAGING, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if status == 0 else result.stderr


@pytest.fixture
def network() -> Iterator[None]:
    if sweep():
        pytest.skip("a network is up on this machine: aipaging down")
    aipaging("up")
    yield
    aipaging("down")
    assert not sweep()


@pytest.fixture
def watch(network: None) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([*AIPAGING, "watch"], stdout=subprocess.PIPE, text=True) as program:
        yield program
        program.kill()


def test_a_stream_goes_on_while_the_operator_moves_its_session(
    watch: subprocess.Popen[str],
) -> None:
    assert "is up already" in aipaging("up", status=1)
    reader = subprocess.Popen([*AIPAGING, *PAGE, "200"], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    while not (known := json.loads(aipaging("sessions", "--json")))["sessions"]:
        assert reader.poll() is None
    source = known["sessions"][0]["commits"][-1]["anchor"]
    target = "edge2" if source == "edge1" else "edge1"
    assert f"is at {target} now" in aipaging("relocate", "ue1", "--to", target)
    session_id = known["sessions"][0]["sessionId"]
    assert target in aipaging("sessions")
    for described in json.loads(aipaging("anchors", "--json"))["anchors"]:
        assert (described["state"], described["readyAisis"]) == ("UP", ["chat.example"])
    answer = json.loads(reader.communicate(timeout=60)[0])
    assert answer["stream"]["complete"]
    assert {token["anchor"] for token in answer["stream"]["tokens"]} == {source}

    assert "is no live session" in aipaging("relocate", "ue2", status=1)
    assert "cannot take" in aipaging("relocate", "ue1", "--to", "moon", status=1)

    aipaging("drain", target)
    assert watch.stdout is not None
    told = [watch.stdout.readline().split()[1:]]
    while told[-1][2:6] != ["committed", source, "epoch", "3"]:
        told.append(watch.stdout.readline().split()[1:])
    assert told[-1] == [session_id[:8], "ue1", "committed", source, "epoch", "3", "DRAIN"]
    assert ["-", "-", "drains", target] in told
    assert [session_id[:8], "ue1", "committed", target, "epoch", "2", "REQUEST"] in told
    watch.send_signal(signal.SIGINT)
    assert watch.wait(10) == 0


def test_without_a_network_the_operator_is_told_so() -> None:
    if sweep():
        pytest.skip("a network is up on this machine: aipaging down")
    for command in (["sessions"], ["watch"], ["relocate", "ue1"], ["shell", "ue1"]):
        assert "no network is up" in aipaging(*command, status=1)
