"""The operator's view of a running daemon: `aipaging sessions`, `anchors`, `relocate`, `drain`."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from controlplane.clock import NS_PER_S, parse_rfc3339
from scripts.daemon import Daemon, NoAnswerError, socket_option
from scripts.errors import UserError

REFRESH_S = 1.0

Read = Callable[[Daemon], Any]
Draw = Callable[[Any], RenderableType]
watch_option = click.option("--watch", is_flag=True, help="Refresh in place, until ^C.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the daemon's answers.")


@click.command()
@socket_option
@watch_option
@json_option
def sessions(path: Path | None, watch: bool, as_json: bool) -> None:
    """Show live sessions: where each is served, until when, and the packets the kernel counted.

    Of a session's id the first 8 characters are shown; they are enough for 'relocate'.
    """
    _show(path, _read_sessions, draw_sessions, watch, as_json)


@click.command()
@socket_option
@watch_option
@json_option
def anchors(path: Path | None, watch: bool, as_json: bool) -> None:
    """Show anchors: state, slots in use, and what each last said of itself."""
    _show(path, _read_anchors, draw_anchors, watch, as_json)


@click.command()
@click.argument("session")
@click.option("--to", "target", help="The anchor to move to; by default the best other one.")
@socket_option
@json_option
def relocate(session: str, target: str | None, path: Path | None, as_json: bool) -> None:
    """Move SESSION (an id or how it begins, or a UE's name) elsewhere, make-before-break."""
    with Daemon(path) as daemon:
        ids = {
            known["sessionId"]
            for known in daemon.ask("GET", "/sessions")["sessions"]
            if session == known["ue"] or known["sessionId"].startswith(session)
        }
        if len(ids) != 1:
            what = "is no live session" if not ids else f"has {len(ids)} sessions: name one"
            raise UserError(f"{session} {what}; see aipaging sessions")
        resource = f"/sessions/{ids.pop()}/relocate"
        answer = daemon.ask("POST", resource, {"target": target} if target else {})
    if as_json:
        click.echo(json.dumps({key: answer[key] for key in answer if key != "aist"}, indent=2))
        return
    commit, timeline = answer["commit"], answer["timeline"]
    took_ms = (timeline["enforcedUnixNs"] - timeline["requestedUnixNs"]) / 1e6
    click.echo(
        f"session {answer['sessionId']} is at {commit['anchor']} now "
        f"(epoch {commit['epoch']}, {took_ms:.1f} ms from request to kernel)"
    )


@click.command()
@click.argument("anchor")
@socket_option
@json_option
def drain(anchor: str, path: Path | None, as_json: bool) -> None:
    """Let ANCHOR take nothing new, and move its sessions away, make-before-break.

    Registering it anew (PUT /anchors/NAME) ends the drain.
    """
    with Daemon(path) as daemon:
        answer = daemon.ask("POST", f"/anchors/{anchor}/drain")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"{anchor} is draining: {answer['slotsUsed']} of its slots are in use")


def draw_sessions(answer: Any) -> RenderableType:
    """Draw what GET /sessions and GET /status answered."""
    sessions, status = answer["sessions"], answer["status"]
    counts: dict[str, list[int]] = {}
    for entry in status["enforced"]:
        sums = counts.setdefault(entry["leaseId"], [0, 0])
        sums[0] += entry["uplinkPackets"]
        sums[1] += entry["downlinkPackets"]
    table = Table(title="Sessions")
    for name in ("session", "UE", "AISI", "anchor", "epoch"):
        table.add_column(name, no_wrap=True)
    for name in ("ends in s", "up", "down"):
        table.add_column(name, justify="right")
    for session in sessions:
        commit = session["commits"][-1]
        left_s = (parse_rfc3339(commit["expiresAt"]) - time.time_ns()) / NS_PER_S
        up, down = counts.get(commit["leaseId"], (0, 0))
        table.add_row(
            session["sessionId"][:8],
            session["ue"],
            session["aisi"] or "-",
            commit["anchor"] or "-",
            str(commit["epoch"]),
            f"{left_s:.1f}",
            f"{up:,}",
            f"{down:,}",
        )
    drops = ", ".join(f"{reason} {count:,}" for reason, count in status["drops"].items())
    parked = ", ".join(f"{outcome} {count:,}" for outcome, count in status["parked"].items())
    lines = [f"dropped by the gate: {drops}", f"waited for a lease: {parked}"]
    if (hidden := answer["total"] - len(sessions)) > 0:
        lines.insert(0, f"and {hidden:,} more")
    return Group(table, Text("\n".join(lines)))


def draw_anchors(answer: Any) -> RenderableType:
    """Draw what GET /anchors answered."""
    table = Table(title="Anchors")
    for name in ("anchor", "provider", "region", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("slots", "load", "latency ms"):
        table.add_column(name, justify="right")
    table.add_column("ready", overflow="fold")
    for anchor in answer["anchors"]:
        latency_ms, ready = anchor["measuredLatencyMs"], anchor["readyAisis"]
        table.add_row(
            anchor["name"],
            anchor["provider"],
            anchor["region"],
            anchor["state"],
            f"{anchor['slotsUsed']:,}/{anchor['slots']:,}",
            f"{anchor['load']:.0%}",
            "-" if latency_ms is None else f"{latency_ms:.1f}",
            "does not say" if ready is None else ", ".join(ready) or "nothing",
        )
    return table


def _read_sessions(daemon: Daemon) -> Any:
    return {**daemon.ask("GET", "/sessions"), "status": daemon.ask("GET", "/status")}


def _read_anchors(daemon: Daemon) -> Any:
    return daemon.ask("GET", "/anchors")


def _show(path: Path | None, read: Read, draw: Draw, watch: bool, as_json: bool) -> None:
    """Show an answer once, or anew every second until ^C."""
    with Daemon(path) as daemon:
        answer = read(daemon)
        if not watch:
            if as_json:
                click.echo(json.dumps(answer, indent=2))
            else:
                Console().print(draw(answer), highlight=False)
            return
        try:
            if as_json:
                _stream(daemon, read, answer)
            else:
                _live(daemon, read, draw, answer)
        except KeyboardInterrupt:
            pass


def _stream(daemon: Daemon, read: Read, answer: Any) -> None:
    while True:
        click.echo(json.dumps(answer, separators=(",", ":")))
        time.sleep(REFRESH_S)
        answer = read(daemon)


def _live(daemon: Daemon, read: Read, draw: Draw, answer: Any) -> None:
    """Draw in place; what is there stays while the daemon is away, and says so."""
    drawn = draw(answer)
    with Live(drawn, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_S)
            try:
                drawn = draw(read(daemon))
                live.update(drawn, refresh=True)
            except NoAnswerError as error:
                live.update(Group(drawn, Text(str(error), style="red")), refresh=True)
