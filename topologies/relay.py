"""A running relay (`topologies.wire`) as its parent sees it."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from topologies.errors import TopologyError

_DEADLINE_S = 10.0


class Relay:
    """The relay process of one wire node; it ends when this object is stopped or forgotten."""

    def __init__(self, name: str, pid: int, delay_ms: float, pairs: Sequence[str]) -> None:
        """Start it in the namespaces of process `pid`; `pairs` are `INTERFACE:INTERFACE`."""
        self.name = name
        program = [sys.executable, "-m", "topologies.wire", f"--delay-us={round(delay_ms * 1000)}"]
        self._process = subprocess.Popen(
            ["mnexec", "-a", str(pid), *program, *pairs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        """Return once it forwards. Raises TopologyError if it does not."""
        line = self._read_line()
        if line != "ready":
            raise TopologyError(f"{self.name}: the relay did not start: {line or self._why()}")

    def check_alive(self) -> None:
        """Raise TopologyError if it has died."""
        if self._process.poll() is not None:
            raise TopologyError(f"{self.name}: the relay has died: {self._why()}")

    def statistics(self) -> list[dict[str, int]]:
        """Frames forwarded, held and dropped, per direction (there and back for each pair)."""
        self.check_alive()
        assert self._process.stdin
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        counts: list[dict[str, int]] = json.loads(self._read_line())
        return counts

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()

    def _read_line(self) -> str:
        stdout: Any = self._process.stdout
        readable = select.poll()  # unlike select(2), it takes any descriptor number
        readable.register(stdout, select.POLLIN)
        if not readable.poll(_DEADLINE_S * 1000):
            raise TopologyError(f"{self.name}: the relay does not answer")
        return str(stdout.readline()).strip()

    def _why(self) -> str:
        assert self._process.stderr
        self._process.kill()
        return self._process.stderr.read().strip() or f"status {self._process.wait()}"
