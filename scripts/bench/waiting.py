"""`aipaging bench waiting`: what it costs that packets wait at the user plane.

First packets wait for a page; a session's uplink waits for a target that is not ready yet.
"""

from __future__ import annotations

import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from scripts.bench import common
from scripts.bench.waiting_site import ANCHORS, LEASE_MS, PORT, SERVICES, Site, Worker, ue_address
from scripts.errors import EXIT_FAILED, UserError, require_root
from topologies.endpoints.worker import NUMBER
from topologies.isolation import run_isolated

METHOD = """\
A daemon (`aipaging serve`) over a router's namespace, UEs and two anchors in others; datagrams are
stamped as they are sent and, by the kernel, as they come. first_packet: a UE with a subscription
sends a burst without a lease; first_ms is from its first packet's sending to its coming, with the
page in between; last_ms is that of the burst's last packet, which a lease steers: the floor.
buffer: a session's uplink goes on at --rate while it relocates to an anchor whose worker process
is started only then (after up to --late-ms); the uplink is held until it is ready, then flipped
and released. wait_ms: the longest that a packet of each relocation was under way. unheld: the
control. The same without a hold, to a worker that says that it is ready --careless-ms before its
sockets are open; it must lose packets. reordered: packets that came after one sent later."""

BURST = 20
BURST_GAP_S = 0.001
PAGE_TIMEOUT_S = 5.0
SETTLE_S = 0.05
UES = 16

Sent = dict[tuple[int, int], int]  # episode, number -> when, Unix ns
Came = list[tuple[int, int, int]]


class Sender:
    """Sends numbered datagrams of a UE to a service at a rate, until stopped."""

    def __init__(self, site: Site, ue: int, aisi: str, version: int, rate_pps: int) -> None:
        self.episode = 0
        self.sent: Sent = {}
        self._gap_s = 1 / rate_pps
        self._socket = open_socket(site, ue, version)
        self._to = (SERVICES[aisi][2][version], PORT)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender")
        self._thread.start()

    def stop(self) -> None:
        """Send no more."""
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        number, due = 0, time.monotonic()
        while not self._stopping.is_set():
            send(self._socket, self._to, self.episode, number, self.sent)
            number += 1
            due += self._gap_s
            time.sleep(max(0.0, due - time.monotonic()))


def open_socket(site: Site, ue: int, version: int) -> socket.socket:
    """Open a UE's socket."""

    def make() -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_DGRAM)
        made.bind((ue_address(ue, version), 0))
        return made

    return site.hosts["ue"].run(make)


def send(handle: socket.socket, to: tuple[str, int], episode: int, number: int, sent: Sent) -> None:
    """Send one datagram; an ICMP error that came for an earlier one is no news."""
    sent[episode, number] = time.time_ns()
    data = NUMBER.pack(episode, number)
    try:
        handle.sendto(data, to)
    except OSError:
        handle.sendto(data, to)


def first_packets(site: Site, bursts: int, version: int) -> dict[str, Any]:
    """Let UEs send without a lease, one after another."""
    worker = site.worker(ANCHORS[0])
    worker.wait()
    sent: Sent = {}
    to = (SERVICES["first"][2][version], PORT)
    for episode in common.steps("first packets", bursts):
        ue = 1 + episode % UES
        with open_socket(site, ue, version) as handle:
            for number in range(BURST):
                send(handle, to, episode, number, sent)
                time.sleep(BURST_GAP_S)
        session = _session(site, f"ue{ue}")
        time.sleep(SETTLE_S)
        site.ask("DELETE", f"/sessions/{session}")
    figures, delay_ms = compared(sent, worker.stop())
    first = [delay_ms[episode, 0] for episode in range(bursts) if (episode, 0) in delay_ms]
    last = [
        delay_ms[episode, BURST - 1]
        for episode in range(bursts)
        if (episode, BURST - 1) in delay_ms
    ]
    return {
        "bursts": bursts,
        **figures,
        "first_ms": common.quantiles(first),
        "last_ms": common.quantiles(last),
    }


def relocations(
    site: Site,
    aisi: str,
    *,
    count: int,
    version: int,
    rate_pps: int,
    late_ms: int,
    careless_ms: int,
    seed: int,
) -> dict[str, Any]:
    """Relocate a session to and fro, each time to a worker that is started for it.

    `careless_ms`: the worker says that it is ready so long before it is, and nothing is held.
    """
    chance = random.Random(seed)
    source, target = ANCHORS
    worker = site.worker(source)
    worker.wait()
    body = {"ue": "ue1", "intent": {"task": SERVICES[aisi][0], "durationMs": LEASE_MS}}
    session = site.ask("POST", "/sessions", body)["sessionId"]
    sender = Sender(site, 1, aisi, version, rate_pps)
    came: Came = []
    took_ms: list[float] = []
    try:
        for episode in common.steps(f"relocations, {aisi}", count):
            sender.episode = episode
            if careless_ms:
                started = site.worker(target, careless_ms)
                started.wait()
                began = time.monotonic()
                site.ask("POST", f"/sessions/{session}/relocate", {"target": target})
            else:
                began = time.monotonic()
                started = _relocate_to_late(site, session, target, chance.uniform(0, late_ms))
            took_ms.append((time.monotonic() - began) * 1e3)
            time.sleep(SETTLE_S + careless_ms / 1e3)
            came += worker.stop()
            worker, source, target = started, target, source
    finally:
        sender.stop()
    time.sleep(SETTLE_S)
    came += worker.stop()
    site.ask("DELETE", f"/sessions/{session}")
    figures, delay_ms = compared(sender.sent, came)
    waits = [
        max((ms for (of, _), ms in delay_ms.items() if of == episode), default=0.0)
        for episode in range(count)
    ]
    return {
        "relocations": count,
        **figures,
        "wait_ms": common.quantiles(waits),
        "delay_ms": common.quantiles(list(delay_ms.values())),
        "relocation_ms": common.quantiles(took_ms),
    }


def _relocate_to_late(site: Site, session: str, target: str, late_ms: float) -> Worker:
    """Ask for a relocation, and only then start who is to take over."""
    started: list[Worker] = []
    timer = threading.Timer(late_ms / 1e3, lambda: started.append(site.worker(target)))
    timer.start()
    try:
        site.ask("POST", f"/sessions/{session}/relocate", {"target": target})
    finally:
        timer.join()
    started[0].wait()
    return started[0]


def compared(sent: Sent, came: Iterable[tuple[int, int, int]]) -> tuple[dict[str, int], Any]:
    """Compare what was sent and what came: counts, and the delay (ms) of each that came."""
    order: list[tuple[int, int]] = []
    delay_ms: dict[tuple[int, int], float] = {}
    twice = 0
    for episode, number, at_ns in sorted(came, key=lambda packet: packet[2]):
        key = (episode, number)
        twice += key in delay_ms
        delay_ms[key] = (at_ns - sent[key]) / 1e6
        order.append(key)
    ranks = np.asarray([sent[key] for key in order], np.int64)
    latest = np.maximum.accumulate(ranks) if len(ranks) else ranks
    figures = {
        "sent": len(sent),
        "lost": len(sent) - len(delay_ms),
        "duplicated": twice,
        "reordered": int(np.count_nonzero(ranks < latest)),
    }
    return figures, delay_ms


def _session(site: Site, ue: str) -> str:
    until = time.monotonic() + PAGE_TIMEOUT_S
    while time.monotonic() < until:
        for session in site.ask("GET", f"/sessions?ue={ue}")["sessions"]:
            return str(session["sessionId"])
        time.sleep(0.005)
    raise UserError(f"{ue} sent, and was not paged for")


def measure(
    *,
    disk: Path,
    count: int,
    version: int,
    rate_pps: int,
    late_ms: int,
    careless_ms: int,
    seed: int,
) -> dict[str, Any]:
    """Measure all of it; return the figures."""
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(dir=disk, prefix=".bench-")))
        site = Site(folder, UES, undo)
        common_ = {"version": version, "rate_pps": rate_pps, "late_ms": late_ms, "seed": seed}
        figures = {
            "first_packet": first_packets(site, count, version),
            "buffer": relocations(site, "held", count=count, careless_ms=0, **common_),
            "unheld": relocations(site, "unheld", count=count, careless_ms=careless_ms, **common_),
        }
        parked = site.ask("GET", "/status")["parked"]
    outcomes = ("released", "dropped", "expired", "held")
    parked["adds_up"] = parked["stored"] == sum(parked[outcome] for outcome in outcomes)
    return {**figures, "parked": parked}


@click.command(help=f"Measure packets that wait at the user plane.\n\n{METHOD}")
@click.option(
    "--json",
    "json_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the figures go.",
)
@click.option("--count", type=click.IntRange(2, 10_000), default=100, show_default=True)
@click.option(
    "--ip",
    "version",
    type=click.Choice(["4", "6"]),
    default="4",
    show_default=True,
    help="Version.",
)
@click.option(
    "--rate", "rate_pps", type=click.IntRange(10, 20_000), default=1_000, show_default=True
)
@click.option("--late-ms", type=click.IntRange(0, 1_000), default=200, show_default=True)
@click.option("--careless-ms", type=click.IntRange(1, 1_000), default=50, show_default=True)
@click.option(
    "--disk",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for the daemon's store while it runs, on a real disk.",
)
@click.option("--seed", type=int, default=1, show_default=True)
def command(json_file: Path, version: str, seed: int, **options: Any) -> None:
    """Measure, write, and show."""
    require_root("a user plane")

    def run() -> int:
        try:
            _run(json_file, int(version), seed, options)
        except UserError as error:
            common.console.print(f"error: {error}", style="red", markup=False, highlight=False)
            return EXIT_FAILED
        return 0

    status = run_isolated(run)  # however it ends, its processes end with it
    if status != 0:
        raise SystemExit(status)


def _run(json_file: Path, version: int, seed: int, options: dict[str, Any]) -> None:
    figures = measure(version=version, seed=seed, **options)
    named = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    common.write_result(
        json_file,
        benchmark="waiting",
        seed=seed,
        options={"version": version, **named},
        figures={"method": METHOD, **figures},
    )
    rows = [
        [
            name,
            *(f"{figures[name][what]:,}" for what in ("sent", "lost", "duplicated", "reordered")),
            *(f"{figures[name][waited][q]:.1f}" for q in common.QUANTILES),
        ]
        for name, waited in (
            ("first_packet", "first_ms"),
            ("buffer", "wait_ms"),
            ("unheld", "wait_ms"),
        )
    ]
    columns = ["", "sent", "lost", "duplicated", "reordered"]
    waits = [f"longest wait {q}, ms" for q in common.QUANTILES]
    parked = ", ".join(f"{outcome} {n:,}" for outcome, n in figures["parked"].items())
    common.print_table("Packets that wait", [*columns, *waits], rows, f"parked: {parked}")
