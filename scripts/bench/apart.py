"""A gate in a process of its own, asked over the agent's socket, as `aipaging upf` is.

python -m scripts.bench.apart NETNS SOCKET
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import uvloop

from controlplane.enforcement import Operation
from controlplane.listeners import UnixListener, listen
from upf.agent import Agent
from upf.features import probe
from upf.gate import Gate
from upf.local import LocalUserPlane
from upf.remote import RemoteUserPlane


class GateApart:
    """The process, and the connection to it."""

    def __init__(self, netns_path: str, undo: ExitStack) -> None:
        """Start it in a network namespace; `undo` ends it."""
        path = Path(undo.enter_context(tempfile.TemporaryDirectory())) / "upf.sock"
        command = [sys.executable, "-m", __name__, netns_path, str(path)]
        process = undo.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        undo.callback(process.kill)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the agent did not start")
        self._runner = undo.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        self._plane = RemoteUserPlane(path)
        self._runner.run(self._plane.__aenter__())
        undo.callback(lambda: self._runner.run(self._plane.__aexit__()))

    def apply(self, operation: Operation) -> float:
        """Apply one operation; return what it took, in microseconds."""
        return self._runner.run(self._apply(operation))

    async def _apply(self, operation: Operation) -> float:
        begin_ns = time.perf_counter_ns()
        await self._plane.apply([operation])
        return (time.perf_counter_ns() - begin_ns) / 1e3


async def _serve(gate: Gate, path: Path) -> None:
    listening = listen(UnixListener("upf", path))
    print("ready", flush=True)
    await Agent(LocalUserPlane(gate), {}).serve(listening, asyncio.Event())


if __name__ == "__main__":
    from scripts.bench.lease_measurements import config

    logging.getLogger("upf.agent").setLevel(logging.ERROR)  # that the bench ends is no news
    features = probe()
    made = Gate(  # it adopts the tables, which the caller's gate has made alike
        sys.argv[1],
        config(),
        in_place_renewal=features.in_place_renewal,
        fast_path=features.tc_bpf,
    )
    uvloop.run(_serve(made, Path(sys.argv[2])))
