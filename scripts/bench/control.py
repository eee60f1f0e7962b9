"""`aipaging bench control`: what a page costs over HTTP and in process, and what evidence costs."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from scripts.bench import common, control_evidence
from scripts.bench.control_world import MAX_UES, World
from scripts.errors import UserError, require_root
from scripts.serve import SOCKET_FILE, write_config

METHOD = """\
Everything is real: SQLite synced in full on the disk of --disk, nftables batches in a network
namespace of the benchmark's own, tokens signed, answers as clients get them. http_*: a daemon
(`aipaging serve`) and the load generator, two processes on the same cores, over the operator's Unix
socket, HTTP/1.1 on kept connections, each page for a UE that has no session. http_page_ms: an open
loop at --rate pages/s; each latency is taken from the instant at which the page was due. \
http_pages_per_s: a closed loop of --clients. http_page_release_pairs_per_s: the same with a release
after each page. inprocess_*: concurrent pages without HTTP. without_evidence: the same, and no
entry is made or written, which only this benchmark does. parts_us_per_page: steps of a page, timed
one by one in a run of its own; write_and_sync is in the writer's thread, beside all others; parse
and response are those of HTTP; rest is what the event loop's thread did besides. Arms follow one
another in each round; figures of rounds are medians. memory: resident set before and after so many
live sessions, in a process of its own. evidence: a log of pages (Prepared and Committed, and
acknowledgements) made, hashed, and written to the disk in batches of 512, one sync each; then
verified, links and rules, as `aipaging evidence verify` does. Proofs: in a tree of
proof_tree_entries. other_work_cores: how many cores other processes kept busy meanwhile."""

START_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 300.0


class Daemon:
    """A control plane served over a world of its own."""

    def __init__(self, disk: Path, ues: int, undo: ExitStack) -> None:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(dir=disk, prefix=".bench-")))
        world = World(folder, ues, undo)
        config = folder / "serve.yaml"
        write_config(config, world.config)
        self.socket = world.config.state / SOCKET_FILE
        self._log = folder / "serve.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scripts.cli", "serve", str(config)],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        undo.callback(self._stop)
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], START_TIMEOUT_S)[0]
        if not ready or not self._process.stdout.readline():
            raise UserError(f"the daemon did not start:\n{self._log.read_text()[-2000:]}")

    def load(self, **load: Any) -> dict[str, Any]:
        """Apply a load from another process; return its figures."""
        return _program("scripts.bench.control_load", str(self.socket), load)

    def cpu_s(self) -> float:
        """Return the CPU time that the daemon has taken, s."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def measure(
    *,
    disk: Path,
    rounds: int,
    pages: int,
    rate_per_s: int,
    clients: int,
    concurrency: int,
    sessions: int,
    entries: int,
    tree_size: int,
    seed: int,
) -> dict[str, Any]:
    """Measure all of it; return the figures."""
    others = OtherWork()
    latencies_ms: list[float] = []
    http: dict[str, list[float]] = defaultdict(list)
    inprocess: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in common.steps("control", rounds):
        with ExitStack() as undo:
            daemon = Daemon(disk, min(3 * pages + 1_000, MAX_UES), undo)
            daemon.load(mode="closed", clients=clients, first=3 * pages, count=1_000)  # warm
            opened = daemon.load(
                mode="open", clients=clients, rate_per_s=rate_per_s, first=0, count=pages
            )
            latencies_ms += opened["latencies_ms"]
            for arm, mode, first in (("pages", "closed", 1), ("pairs", "pairs", 2)):
                before_s = daemon.cpu_s()
                done = daemon.load(mode=mode, clients=clients, first=first * pages, count=pages)
                http[arm].append(pages / done["took_s"])
                http[f"{arm}_cpu_us"].append((daemon.cpu_s() - before_s) / pages * 1e6)
                http[f"{arm}_client_cpu_us"].append(done["cpu_s"] / pages * 1e6)
        for arm, mode, evidence in (
            ("with", "pages", True),
            ("without", "pages", False),
            ("parts", "parts", True),
        ):
            asked = {
                "mode": mode,
                "evidence": evidence,
                "pages": pages * 2,
                "ues": min(pages * 3, MAX_UES),
                "concurrency": concurrency,
            }
            inprocess[arm].append(_process(disk, asked))
    with tempfile.TemporaryDirectory(dir=disk, prefix=".bench-") as folder:
        evidence_figures = control_evidence.measure(
            Path(folder), entries=entries, tree_size=tree_size, seed=seed
        )
    memory = _process(
        disk,
        {
            "mode": "memory",
            "sessions": sessions,
            "ues": (sessions + 1) // 2,
            "concurrency": concurrency,
        },
    )
    found = {arm: _medians(taken) for arm, taken in inprocess.items()}
    return {
        "http_page_ms": common.quantiles(latencies_ms),
        "http_pages_per_s": float(np.median(http["pages"])),
        "http_cpu_us_per_page": float(np.median(http["pages_cpu_us"])),
        "http_client_cpu_us_per_page": float(np.median(http["pages_client_cpu_us"])),
        "http_page_release_pairs_per_s": float(np.median(http["pairs"])),
        "inprocess_pages_per_s": found["with"]["pages_per_s"],
        "inprocess": found["with"],
        "without_evidence": found["without"],
        "parts_us_per_page": found["parts"],
        "evidence_us_per_page": found["with"]["us_per_page"] - found["without"]["us_per_page"],
        "evidence_bytes_per_entry": found["with"]["bytes_per_entry"],
        "memory_bytes_per_session": memory["bytes_per_session"],
        "memory_sessions": memory["sessions"],
        **evidence_figures,
        "filesystem": _filesystem(disk),
        "other_work_cores": others.cores(),
        "method": METHOD,
    }


class OtherWork:
    """How much of the machine others take: its busy time, without that of this benchmark."""

    def __init__(self) -> None:
        self._before = self._now()

    def cores(self) -> float:
        """Return how many cores they have kept busy since the start."""
        took_s, busy_s, own_s = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        return max(0.0, busy_s - own_s) / took_s

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own_s = sum(one.ru_utime + one.ru_stime for one in used)
        return time.monotonic(), busy_s, own_s


def _medians(taken: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: float(np.median([figures[name] for figures in taken]))
        for name, value in taken[0].items()
        if value is not None
    }


def _process(disk: Path, asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=disk, prefix=".bench-") as folder:
        return _program("scripts.bench.control_process", folder, asked)


def _program(module: str, where: str, asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, where, json.dumps(asked)],
        capture_output=True,
        timeout=LOAD_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"{module} failed:\n{done.stderr.decode()[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _filesystem(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, found, *_ = line.split(" ")
        if os.path.commonpath([mounted, folder.resolve()]) == mounted and len(mounted) >= len(best):
            best, kind = mounted, found
    return kind


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    page = figures["http_page_ms"]
    both = " / ".join(f"{figures[f'http_{who}cpu_us_per_page']:,.0f}" for who in ("", "client_"))
    rows = [
        ("page over HTTP, p50 / p99, ms", f"{page['p50']:.2f} / {page['p99']:.2f}"),
        ("pages/s over HTTP, closed loop", f"{figures['http_pages_per_s']:,.0f}"),
        ("of it, µs of CPU a page, daemon / clients", both),
        ("page and release, pairs/s", f"{figures['http_page_release_pairs_per_s']:,.0f}"),
        ("pages/s in process", f"{figures['inprocess_pages_per_s']:,.0f}"),
        ("of it, µs of CPU a page", f"{figures['inprocess']['cpu_us_per_page']:,.0f}"),
        ("evidence, µs a page", f"{figures['evidence_us_per_page']:,.0f}"),
        ("evidence entries/s, durable", f"{figures['evidence_entries_per_s']:,.0f}"),
        ("evidence entries verified/s", f"{figures['evidence_entries_verified_per_s']:,.0f}"),
        ("evidence bytes/entry", f"{figures['evidence_bytes_per_entry']:,.0f}"),
        ("proofs verified/s", f"{figures['proofs_verified_per_s']:,.0f}"),
        ("memory, bytes/session", f"{figures['memory_bytes_per_session']:,.0f}"),
        ("cores that other work kept busy", f"{figures['other_work_cores']:.2f}"),
    ]
    common.print_table("The control plane", ("figure", "value"), rows)
    parts = figures["parts_us_per_page"].items()
    steps = [(step.replace("_", " "), f"{us:,.1f}") for step, us in parts]
    common.print_table("Where the time of a page goes", ("step", "µs"), steps)


@click.command()
@click.option(
    "--json",
    "path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the figures go.",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option(
    "--pages",
    default=4_000,
    show_default=True,
    type=click.IntRange(100, 15_000),
    help="Of each arm, in each round.",
)
@click.option(
    "--rate",
    default=200,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Pages/s of the open loop.",
)
@click.option("--clients", default=64, show_default=True, type=click.IntRange(1, 1_000))
@click.option("--concurrency", default=256, show_default=True, type=click.IntRange(1, 10_000))
@click.option(
    "--sessions",
    default=100_000,
    show_default=True,
    type=click.IntRange(100, 100_000),
    help="Live at once, to measure memory.",
)
@click.option(
    "--entries",
    default=200_000,
    show_default=True,
    type=click.IntRange(100, 10_000_000),
    help="Of the log that is written and verified.",
)
@click.option(
    "--tree",
    default=1_000_000,
    show_default=True,
    type=click.IntRange(100, 10_000_000),
    help="Entries of the tree in which proofs are made.",
)
@click.option(
    "--disk",
    default=".",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="A folder on the disk to write to; by default the current one.",
)
@click.option("--seed", default=1, show_default=True, help="Of the entries that are proved.")
def command(
    path: Path,
    rounds: int,
    pages: int,
    rate: int,
    clients: int,
    concurrency: int,
    sessions: int,
    entries: int,
    tree: int,
    disk: Path,
    seed: int,
) -> None:
    """Measure the control plane: pages over HTTP and in process, evidence, memory.

    Every page is durable, evidenced and enforced by a kernel before it is answered. Takes some
    minutes with the defaults; load generator and daemon share this machine's cores.

    \\b
    Example:
      aipaging bench control --json results/control.json

    In the file: http_page_ms.p50, http_page_ms.p99, http_pages_per_s, inprocess_pages_per_s,
    evidence_entries_per_s, evidence_bytes_per_entry, memory_bytes_per_session and more;
    docs/performance.md explains them.
    """
    require_root("a benchmark of the kernel")
    options: dict[str, Any] = {
        "rounds": rounds,
        "pages": pages,
        "rate_per_s": rate,
        "clients": clients,
        "concurrency": concurrency,
        "sessions": sessions,
        "entries": entries,
        "tree_size": tree,
    }
    figures = measure(disk=disk.resolve(), seed=seed, **options)
    show(figures)
    common.write_result(path, benchmark="control", seed=seed, options=options, figures=figures)
