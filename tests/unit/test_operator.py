"""The operator's commands against a daemon of canned answers, on a Unix socket."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import click
import pytest

from scripts import operator, watch
from scripts.daemon import Daemon
from scripts.errors import UserError

COMMIT = {
    "leaseId": "l2",
    "epoch": 2,
    "anchor": "edge2",
    "state": "COMMITTED",
    "expiresAt": "2100-01-01T00:00:00.000000000Z",
}
SESSION = {
    "sessionId": "5e55101d-0000",
    "ue": "ue1",
    "aisi": "chat",
    "commits": [{**COMMIT, "leaseId": "l1", "epoch": 1, "anchor": "edge1"}, COMMIT],
}
QOS_ALONE = {
    "sessionId": "905a1000-0000",
    "ue": "ue2",
    "aisi": None,
    "commits": [{**COMMIT, "leaseId": "l3", "anchor": None}],
}
COUNTS = {"leaseId": "l2", "uplinkPackets": 1_000, "downlinkPackets": 20}
ANCHOR = {
    "name": "edge2",
    "provider": "operator",
    "region": "north",
    "state": "DRAINING",
    "slotsUsed": 2,
    "slots": 64,
    "load": 0.03,
    "measuredLatencyMs": 20.25,
    "readyAisis": ["chat"],
}
SILENT = {**ANCHOR, "name": "cloud", "measuredLatencyMs": None, "readyAisis": None}
AT = "2030-01-01T12:00:00.123456789Z"


class Canned:
    """What the daemon answers, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.last_event_ids: list[str | None] = []
        self.events: list[tuple[int, str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {
            "GET /sessions": {"sessions": [SESSION, QOS_ALONE], "total": 5},
            "GET /status": {
                "enforced": [COUNTS, COUNTS],
                "drops": {"no_lease": 7},
                "parked": {"stored": 3, "released": 3},
                "evidence": {"entries": 6},
            },
            "GET /anchors": {"anchors": [ANCHOR, SILENT]},
            "POST /anchors/edge2/drain": ANCHOR,
            f"POST /sessions/{SESSION['sessionId']}/relocate": {
                "sessionId": SESSION["sessionId"],
                "aist": "secret",
                "commit": COMMIT,
                "timeline": {"requestedUnixNs": 0, "enforcedUnixNs": 2_500_000},
            },
        }

    @contextmanager
    def serving(self, path: Path) -> Iterator[None]:
        canned = self

        class Handler(BaseHTTPRequestHandler):
            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/events":
                    self.events()
                else:
                    self.answer("GET")

            def do_POST(self) -> None:
                self.answer("POST")

            def answer(self, method: str) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                canned.asked.append((f"{method} {self.path}", json.loads(body or "null")))
                found = canned.answers.get(f"{method} {self.path}")
                told = {"detail": "there is no such thing"} if found is None else found
                self.send(404 if found is None else 200, json.dumps(told).encode())

            def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def events(self) -> None:
                after = self.headers["last-event-id"]
                canned.last_event_ids.append(after)
                lines = [": ping\n\n", 'event: overrun\ndata: {"resumeWith":"Last-Event-ID"}\n\n']
                lines += [
                    f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
                    for number, kind, data in canned.events
                    if number > int(after)
                ]
                self.send(200, "".join(lines).encode(), "text/event-stream")

        server = ThreadingUnixStreamServer(str(path), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            path.unlink()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "operator.sock"


@pytest.fixture
def daemon(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Canned]:
    monkeypatch.setenv("COLUMNS", "200")
    canned = Canned()
    with canned.serving(path):
        yield canned


def run(command: click.Command, path: Path, *arguments: str) -> None:
    command.main([*arguments, "--socket", str(path)], standalone_mode=False)


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


def test_sessions(daemon: Canned, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(operator.sessions, path)
    text = capsys.readouterr().out
    first, second = rows(text)
    assert first[:5] == ["5e55101d", "ue1", "chat", "edge2", "2"]
    assert float(first[5]) > 0
    assert first[6:] == ["2,000", "40"]
    assert second[:4] == ["905a1000", "ue2", "-", "-"]
    assert second[6:] == ["0", "0"]
    assert "and 3 more" in text
    assert "no_lease 7" in text
    run(operator.sessions, path, "--json")
    assert json.loads(capsys.readouterr().out)["sessions"] == [SESSION, QOS_ALONE]


def test_anchors(daemon: Canned, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(operator.anchors, path)
    first, second = rows(capsys.readouterr().out)
    assert first == ["edge2", "operator", "north", "DRAINING", "2/64", "3%", "20.2", "chat"]
    assert second[6:] == ["-", "does not say"]
    run(operator.anchors, path, "--json")
    assert json.loads(capsys.readouterr().out)["anchors"] == [ANCHOR, SILENT]


def test_a_live_view_lives_through_a_restart_and_ends_with_interrupt(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    canned = Canned()
    shown: list[str] = []
    steps: list[Any] = []

    def later(_: float) -> None:
        """Between two refreshes: the daemon goes, is back with one anchor, and ^C is typed."""
        shown.append(capsys.readouterr().out)
        steps.append(None)
        if len(steps) == 1:
            serving.__exit__(None, None, None)
        elif len(steps) == 2:
            canned.answers["GET /anchors"] = {"anchors": [{**ANCHOR, "state": "UP"}]}
            again.__enter__()
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", later)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    serving, again = canned.serving(path), canned.serving(path)
    serving.__enter__()
    run(operator.anchors, path, "--watch")
    again.__exit__(None, None, None)
    assert len(shown) == 3
    assert "DRAINING" in shown[0]
    assert "DRAINING" in shown[1]
    assert f"there is no {path}" in shown[1].replace("\n", " ")
    assert "DRAINING" not in shown[2]
    assert "UP" in shown[2]


def test_relocate_and_drain(daemon: Canned, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(operator.relocate, path, "ue1", "--to", "edge2")
    resource = f"POST /sessions/{SESSION['sessionId']}/relocate"
    assert daemon.asked[-1] == (resource, {"target": "edge2"})
    assert "is at edge2 now (epoch 2, 2.5 ms" in capsys.readouterr().out
    run(operator.relocate, path, "5e55", "--json")
    assert daemon.asked[-1] == (resource, {})
    assert "secret" not in capsys.readouterr().out
    with pytest.raises(UserError, match="ue7 is no live session"):
        run(operator.relocate, path, "ue7")
    run(operator.drain, path, "edge2")
    assert "edge2 is draining: 2 of its slots" in capsys.readouterr().out
    with pytest.raises(UserError, match="refused: there is no such thing"):
        run(operator.drain, path, "moon")


@pytest.mark.parametrize(
    "command", [operator.sessions, operator.anchors, watch.command], ids=lambda c: str(c.name)
)
def test_without_a_daemon_one_is_told_what_to_do(command: click.Command, path: Path) -> None:
    with pytest.raises(UserError, match="start 'aipaging serve', or name its socket"):
        run(command, path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(UserError, match="the daemon has ended; start it again"):
        run(command, path)


def events(*epochs: int) -> list[tuple[int, str, dict[str, Any]]]:
    return [
        (number, "Committed", {"at": AT, "sessionId": "5e55101d-0000", "epoch": number})
        for number in epochs
    ]


def test_no_event_is_missed_when_the_daemon_is_started_anew(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned = Canned()
    canned.events = events(5, 6, 7)  # 6 entries, 0 to 5, were there before
    seen = []
    with Daemon(path) as daemon:
        with canned.serving(path):
            following = watch.follow(daemon)
            seen += [next(following).id, next(following).id]
        canned.events = events(6, 7, 8)
        with canned.serving(path):
            seen.append(next(following).id)
    assert seen == ["6", "7", "8"]
    assert canned.last_event_ids[0] == "5"
    assert canned.last_event_ids[-1] == "7"


def test_what_a_person_reads_of_an_event() -> None:
    session = {"at": AT, "sessionId": "5e55101d-0000", "ue": "ue1", "anchor": "edge2", "epoch": 2}
    told = watch.line("Committed", {**session, "cause": "FAILURE"})
    assert told.split()[1:] == ["5e55101d", "ue1", "committed", "edge2", "epoch", "2", "FAILURE"]
    ended = {"reason": "RELEASED", "cause": "PAGE", "uplinkPackets": 1_000, "downlinkPackets": 2}
    told = watch.line("Ended", {**session, **ended})
    assert told.endswith("epoch 2  RELEASED  (1,000 up, 2 down)")
    told = watch.line("AnchorFailed", {"at": AT, "anchor": "edge1", "reason": "it was silent"})
    assert told.split(maxsplit=5)[1:] == ["-", "-", "failed", "edge1", "it was silent"]
    told = watch.line("UeMoved", {"at": AT, "ue": "ue1", "gnb": "gnb2"})
    assert told.split()[1:] == ["-", "ue1", "handed", "over", "gnb2"]
    assert watch.line("Started", {"at": AT}).split()[3:6] == ["controller", "took", "over"]


def test_watch_as_a_program(daemon: Canned, path: Path) -> None:
    daemon.events = [*events(6), (7, "Acknowledged", {"at": AT}), *events(8)]
    command = [sys.executable, "-m", "scripts.cli", "watch", "--socket", str(path)]
    for options, count in ([], 2), (["--json"], 3):
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            lines = [program.stdout.readline() for _ in range(count)]
            program.send_signal(signal.SIGINT)
            out, errors = program.communicate(timeout=10)
        assert (program.returncode, out, errors) == (0, "", "")
        if options:
            assert [json.loads(line)["id"] for line in lines] == ["6", "7", "8"]
            assert json.loads(lines[1]) == {"id": "7", "event": "Acknowledged", "at": AT}
        else:
            assert all("committed" in line for line in lines)
