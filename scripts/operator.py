"""`aipaging sessions` and `aipaging relocate`: the operator's view of the network that is up."""

import json
import time
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console
from rich.table import Table

from controlplane.clock import NS_PER_S, parse_rfc3339
from scripts.errors import UserError, require_root
from scripts.testbed import OPERATOR_SOCKET
from topologies.isolation import SCRATCH
from topologies.registry import sweep

TIMEOUT_S = 10.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the controller's own answers.")
def sessions(as_json: bool) -> None:
    """Show live sessions: where each is served, until when, and the packets the kernel counted."""
    with _controller() as controller:
        live = _ask(controller, "GET", "/sessions")["sessions"]
        status = _ask(controller, "GET", "/status")
    if as_json:
        click.echo(json.dumps({"sessions": live, "status": status}, indent=2))
        return
    table = Table(title="Sessions")
    for name in ("session", "UE", "AISI", "anchor", "epoch"):
        table.add_column(name, no_wrap=True)
    for name in ("ends in s", "up", "down"):
        table.add_column(name, justify="right")
    for session in live:
        commit = session["commits"][-1]
        left_s = (parse_rfc3339(commit["expiresAt"]) - time.time_ns()) / NS_PER_S
        counted = [e for e in status["enforced"] if e["leaseId"] == commit["leaseId"]]
        table.add_row(
            session["sessionId"],
            session["ue"],
            session["aisi"],
            commit["anchor"],
            str(commit["epoch"]),
            f"{left_s:.1f}",
            f"{sum(entry['uplinkPackets'] for entry in counted):,}",
            f"{sum(entry['downlinkPackets'] for entry in counted):,}",
        )
    console = Console()
    console.print(table)
    drops = ", ".join(f"{reason} {count:,}" for reason, count in status["drops"].items())
    console.print(f"dropped by the gate: {drops}", highlight=False)


@click.command()
@click.argument("session")
@click.option("--to", "target", help="The anchor to move to; by default the best other one.")
@click.option("--json", "as_json", is_flag=True, help="Print the controller's own answer.")
def relocate(session: str, target: str | None, as_json: bool) -> None:
    """Move SESSION (an id, or a UE's name) to another anchor, make-before-break."""
    with _controller() as controller:
        ids = {
            known["sessionId"]
            for known in _ask(controller, "GET", "/sessions")["sessions"]
            if session in (known["sessionId"], known["ue"])
        }
        if len(ids) != 1:
            what = "is no live session" if not ids else f"has {len(ids)} sessions: name one"
            raise UserError(f"{session} {what}; see aipaging sessions")
        path = f"/sessions/{ids.pop()}/relocate"
        answer = _ask(controller, "POST", path, {"target": target} if target else {})
    if as_json:
        click.echo(json.dumps({key: answer[key] for key in answer if key != "aist"}, indent=2))
        return
    commit, timeline = answer["commit"], answer["timeline"]
    took_ms = (timeline["enforcedUnixNs"] - timeline["requestedUnixNs"]) / 1e6
    click.echo(
        f"session {answer['sessionId']} is at {commit['anchor']} now "
        f"(epoch {commit['epoch']}, {took_ms:.1f} ms from request to kernel)"
    )


def _controller() -> httpx.Client:
    require_root("the operator's side")
    live = sweep()
    if not live:
        raise UserError("no network is up: start one with 'aipaging up'")
    # The socket is in the run's own mount namespace.
    path = Path(f"/proc/{live[0].init_pid}/root") / (SCRATCH / OPERATOR_SOCKET).relative_to("/")
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)),
        base_url="http://controller",
        timeout=TIMEOUT_S,
        trust_env=False,
    )


def _ask(controller: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    try:
        answer = controller.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise UserError(f"the controller does not answer: {error}") from error
    if answer.is_error:
        raise UserError(f"refused: {answer.json().get('detail', answer.text)}")
    return answer.json()
