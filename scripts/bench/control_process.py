"""The parts of `bench control` without HTTP, each in a process of its own.

    python -m scripts.bench.control_process FOLDER '{"mode": "pages", "pages": 6000, ...}'

`pages`: concurrent pages; with `"evidence": false` no entry is made or written, which only this
benchmark does. `parts`: the same, with each step timed. `memory`: live sessions held at once. One
line of JSON at the end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvloop

from controlplane import memory
from controlplane.clock import Clock
from controlplane.fleet import Heartbeat
from controlplane.intent import Intent
from controlplane.keys import KeyRing, generate_key
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import Page
from controlplane.policy import Tenants
from controlplane.service import Options, Service
from controlplane.sqlite_outbox import SqliteOutbox
from controlplane.sqlite_store import SqliteStore
from scripts.bench.control_parts import WRITE, Parts
from scripts.bench.control_world import ANCHOR, FAILURE_DETECTION_MS, TASKS, World, catalogue
from scripts.http_anchors import HttpAnchors
from scripts.user_plane import user_plane

LEASE_MS = 3_600_000


async def _forget(*_: object) -> None:
    """In place of writing evidence: what a page costs without. For comparison only."""


async def measure(folder: Path, asked: dict[str, Any], world: World, service: Service) -> Any:
    """Run what is asked for over a running control plane."""
    async with service.running() as plane:
        aisis = frozenset(f"bench.{task}" for task in TASKS)
        await plane.keeper.heartbeat(
            ANCHOR, Heartbeat(boot_id="bench", load=0.1, ready_aisis=aisis)
        )
        memory.settle()  # as the daemon does
        if not asked.get("evidence", True):
            patch.object(plane.log, "append", _forget).start()
        if asked["mode"] == "memory":
            return await _memory(plane, asked["sessions"], asked["concurrency"])
        await _page_all(plane, 0, asked["pages"] // 10, asked["concurrency"])  # warm
        if asked["mode"] == "parts":
            return await _parts(plane, asked["pages"], asked["concurrency"])
        load = plane.controller.committer.load
        before = (load.batches, load.changes, load.encode_ns, load.write_ns, load.kernel_ns)
        started, cpu = time.perf_counter(), time.process_time()
        await _page_all(plane, asked["pages"] // 10, asked["pages"], asked["concurrency"])
        took_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        after = (load.batches, load.changes, load.encode_ns, load.write_ns, load.kernel_ns)
        batches, changes, encode, write, kernel = (
            last - first for last, first in zip(after, before, strict=True)
        )
        pages = asked["pages"]
        return {
            "pages_per_s": pages / took_s,
            "us_per_page": took_s / pages * 1e6,
            "cpu_us_per_page": cpu_s / pages * 1e6,
            "pages_per_batch": changes / batches,
            "encode_and_write_us_per_page": (encode + write) / pages / 1000,
            "kernel_us_per_page": kernel / pages / 1000,
            "bytes_per_entry": _bytes_per_entry(plane) if asked["evidence"] else None,
        }


def _bytes_per_entry(plane: ControlPlane) -> float:
    size = plane.log.size
    return sum(len(piece) for piece in plane.log.read(0, size)) / size


async def _page_all(
    plane: ControlPlane, first: int, count: int, concurrency: int, parts: Parts | None = None
) -> None:
    numbers = iter(range(first, first + count))
    ues = len(plane.controller.subscribers)

    async def client() -> None:
        for number in numbers:
            ue, asked = f"ue{number % ues}", {"task": TASKS[number // ues], "durationMs": LEASE_MS}
            # As it comes from HTTP: an object of its own each time.
            intent = parts.parse(ue, asked).intent if parts else Intent.model_validate(asked)
            granted = await plane.pager.page(Page(tenant="operator", ue=ue, intent=intent))
            if parts:
                parts.answer(plane.controller, granted)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def _parts(plane: ControlPlane, pages: int, concurrency: int) -> dict[str, float]:
    """Return µs a page of each step; `rest` is what the event loop's thread did besides."""
    parts, started_ns = Parts(), time.thread_time_ns()
    with parts.watching():
        await _page_all(plane, pages // 10, pages, concurrency, parts)
    all_ns = time.thread_time_ns() - started_ns
    write_ns = parts.ns.pop(WRITE)
    steps = {**parts.ns, "rest": all_ns - sum(parts.ns.values()), WRITE: write_ns}
    return {step: ns / pages / 1e3 for step, ns in steps.items()}


async def _memory(plane: ControlPlane, sessions: int, concurrency: int) -> dict[str, float]:
    before = _resident_bytes()
    await _page_all(plane, 0, sessions, concurrency)
    gc.collect()
    held = _resident_bytes() - before
    assert plane.controller.ledger.live_sessions == sessions
    return {"sessions": sessions, "bytes_per_session": held / sessions}


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main() -> None:
    """Measure and print."""
    folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    with ExitStack() as undo:
        world = World(folder, asked["ues"], undo)
        listed = catalogue()
        enforcer = undo.enter_context(user_plane(world.config, listed))
        world.config.state.mkdir(mode=0o700)
        store = undo.enter_context(closing(SqliteStore(world.config.state / "control.db")))
        clock = Clock()

        async def run() -> Any:
            service = Service(
                catalogue=listed,
                network=world.config.network(),
                tenants=Tenants(),
                store=store,
                outbox=SqliteOutbox(store),
                keys=KeyRing.open(world.config.state / "keys", time.time_ns()),
                evidence_key=generate_key(world.config.state / "evidence.key"),
                enforcer=enforcer,
                gateway=HttpAnchors(listed, world.config.anchors),
                clock=clock,
                options=Options(failure_detection_ms=FAILURE_DETECTION_MS),
            )
            return await measure(folder, asked, world, service)

        print(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
