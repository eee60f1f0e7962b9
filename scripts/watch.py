"""`aipaging watch`: what happens in a running daemon, as it happens."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from scripts.daemon import Daemon, check, socket_option

RETRY_S = 0.2  # between attempts to reach a daemon that has gone
SILENCE_S = 60.0  # the stream brings a comment at least every 15 s
OVERRUN = "overrun"  # we were too slow: nothing is lost, the next connection goes on from there

WORDS = {
    "Started": "controller took over",
    "Prepared": "prepared",
    "Committed": "committed",
    "Renewed": "extended",
    "DrainStarted": "drains",
    "Ended": "ended",
    "UplinkHeld": "uplink held",
    "UplinkResumed": "goes on",
    "AnchorRegistered": "registered",
    "AnchorDraining": "drains",
    "AnchorDeregistered": "deregistered",
    "AnchorFailed": "failed",
    "AnchorRecovered": "recovered",
    "UeMoved": "handed over",
    "PolicySet": "has another policy",
}
UNSHOWN = {"Acknowledged"}  # the kernel's word for a COMMIT that has been shown


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object an event, all of it.")
def command(path: Path | None, as_json: bool) -> None:
    """Follow what happens: one line an event, until ^C.

    A line is: time, session (its id's first 8 characters), UE, what happened, anchor, epoch, and
    the reason. When the daemon is started anew, it goes on where it was: no event is missed.
    """
    try:
        with Daemon(path) as daemon:
            for event in follow(daemon):
                if as_json:
                    click.echo(json.dumps({"id": event.id, "event": event.event, **event.json()}))
                elif event.event not in UNSHOWN:
                    click.echo(line(event.event, event.json()))
    except KeyboardInterrupt:
        pass


def follow(daemon: Daemon) -> Iterator[ServerSentEvent]:
    """Yield events from now on, across restarts of the daemon. Raises UserError if it is not there.

    Once it was there, what is wrong is said on stderr, and it is tried again.
    """
    last = str(daemon.ask("GET", "/status")["evidence"]["entries"] - 1)
    away = False
    while True:
        try:
            headers = {"last-event-id": last, "accept": "text/event-stream"}
            with daemon.client.stream(
                "GET", "/events", headers=headers, timeout=SILENCE_S
            ) as answer:
                check(answer)
                if away:
                    click.echo("the daemon is back", err=True)
                    away = False
                for event in EventSource(answer).iter_sse():
                    if event.event != OVERRUN:
                        last = event.id
                        yield event
        except httpx.HTTPError as error:
            if not away:
                click.echo(f"{daemon.no_answer(error)}; waiting for it", err=True)
                away = True
        except SSEError as error:
            raise daemon.no_answer(httpx.DecodingError(str(error))) from error
        time.sleep(RETRY_S)


def line(kind: str, data: dict[str, Any]) -> str:
    """Return what a person reads of an event."""
    at = datetime.fromisoformat(data["at"][:26] + "+00:00").astimezone()
    words = [
        at.strftime("%H:%M:%S.%f")[:-3],
        f"{data.get('sessionId', '-')[:8]:8}",
        f"{data.get('ue') or '-':8}",
        f"{WORDS.get(kind, kind):12}",
        f"{data.get('anchor') or data.get('gnb') or '-':8}",
    ]
    if "epoch" in data:
        words.append(f"epoch {data['epoch']}")
    # Why it ended, if it did; otherwise what the lease was granted for.
    if reason := data.get("reason") or (kind == "Committed" and data.get("cause")):
        words.append(reason)
    if kind == "Ended" and "uplinkPackets" in data:
        words.append(f"({data['uplinkPackets']:,} up, {data['downlinkPackets']:,} down)")
    return "  ".join(words).rstrip()
