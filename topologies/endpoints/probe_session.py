"""The driver's side of the probe: start it, move a flow's source, stop it, read what it did."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from topologies.endpoints.probe_plan import ProbePlan

START_TIMEOUT_S = 30.0
SWITCH_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 120.0
"""For the records of a long run; on top of the waiting time."""


class ProbeError(RuntimeError):
    """The probe died, refused an order or did not answer in time; its own words are included."""


@dataclass(frozen=True, slots=True)
class Switched:
    """A flow's source has moved."""

    flow_id: int
    site: str
    first_seq: int
    """The first sequence number that `site` sent."""
    at_ns: int
    """CLOCK_REALTIME just before that packet was sent."""


@dataclass(frozen=True, slots=True)
class ProbeStats:
    """The probe's account of itself, from `probe.json`."""

    folder: Path
    """Holds `sent.parquet`, `received.parquet`, `unsent.parquet` and `probe.json`."""
    sent: dict[int, int]
    """Packets sent, by flow id."""
    received: dict[int, int]
    """Datagrams received, duplicates included, by flow id."""
    missed_sends: int
    """Packets that were due and not sent because the sender came too late."""
    send_errors: int
    """Packets that the kernel refused to send."""
    overflow: int
    """Datagrams that the probe's own full socket buffers dropped."""
    malformed: int
    """Datagrams received that are not of this run."""
    clock_stepped: bool
    raw: dict[str, Any]
    """All of `probe.json`."""

    @classmethod
    def load(cls, folder: Path) -> ProbeStats:
        """Read `probe.json` in `folder`."""
        raw = json.loads((folder / "probe.json").read_text())
        flows = raw["sender"]["flows"]
        sockets = raw["receiver"]["overflow"] + raw["echo"]["overflow"]
        return cls(
            folder=folder,
            sent={flow["id"]: flow["sent"] for flow in flows},
            received={flow["id"]: flow["received"] for flow in raw["receiver"]["received"]},
            missed_sends=sum(flow["missed_sends"] for flow in flows),
            send_errors=sum(sum(flow["send_errors"].values()) for flow in flows),
            overflow=sum(entry["dropped"] for entry in sockets),
            malformed=raw["receiver"]["malformed"],
            clock_stepped=raw["clock_stepped"],
            raw=raw,
        )


class ProbeSession:
    """A probe that runs as a program of its own while the driver does other things.

    A context manager: leaving it ends the program, whatever happened. Not for use by two threads
    at once.
    """

    def __init__(self, plan: ProbePlan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """The program's process id, once started."""
        return None if self._process is None else self._process.pid

    def start(self) -> int:
        """Start the probe; returns when the first packet is sent (CLOCK_REALTIME ns)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan_file = self.folder / "probe-plan.json"
        self.plan.save(plan_file)
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "topologies.endpoints.probe", plan_file, self.folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            return int(self._event("ready", START_TIMEOUT_S)["begin_ns"])
        except BaseException:
            self.kill()
            raise

    def switch_source(self, flow_id: int, site: str) -> Switched:
        """Have a downlink flow sent from `site`; returns once it is, to the packet.

        Switching to the site that is sending already is an error: there would be no first packet.
        """
        self._order({"switch": flow_id, "site": site})
        event = self._event("switched", SWITCH_TIMEOUT_S)
        return Switched(event["flow"], event["site"], event["first_seq"], event["at_ns"])

    def check(self) -> None:
        """Raise ProbeError if the program is gone."""
        if self._process is None or self._process.poll() is not None:
            raise ProbeError(f"probe is not running: {self._words()}")

    def stop(self) -> ProbeStats:
        """End the sending, wait for stragglers, and return the figures once all is on disk."""
        if self._process is None or self._process.stdin is None:
            raise ProbeError("probe was not started")
        self._process.stdin.close()
        self._event("done", self.plan.waiting_time_ms / 1000 + WRITE_TIMEOUT_S)
        if self._process.wait(SWITCH_TIMEOUT_S) != 0:
            raise ProbeError(f"probe failed: {self._words()}")
        return ProbeStats.load(self.folder)

    def kill(self) -> None:
        """End the program without records if it still runs. Its children die with it."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def _errors(self) -> Path:
        return self.folder / "probe.log"

    def _words(self) -> str:
        return self._errors.read_text().strip()[-2000:] if self._errors.exists() else ""

    def _order(self, order: dict[str, Any]) -> None:
        self.check()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _event(self, name: str, timeout_s: float) -> dict[str, Any]:
        """The next event, which must be of this name."""
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        until = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = max(0.0, until - time.monotonic())
            if not select.select([stdout], [], [], left)[0]:
                raise ProbeError(f"probe: no {name!r} within {timeout_s} s: {self._words()}")
            data = self._process.stdout.read1()  # type: ignore[attr-defined]
            if not data:
                raise ProbeError(f"probe died: {self._words()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        event: dict[str, Any] = json.loads(line)
        if event["event"] != name:
            raise ProbeError(f"probe: expected {name!r}, got {event}")
        return event
