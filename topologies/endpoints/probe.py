"""The probe program: `python -m topologies.endpoints.probe PLAN.json FOLDER`.

It opens the plan's sockets in their namespaces, forks a receiver, an echo and a sender, and obeys
its standard input, one JSON object a line:

    {"switch": FLOW_ID, "site": "NAME"}    send the flow from another of its sites

On standard output it says, a line each, `{"event": "ready", ...}` when packets are about to flow,
`{"event": "switched", ...}` when a switch took effect, `{"event": "done"}` when the records are
written. End of input, SIGTERM or the plan's `max_duration_s` end it: the sender stops, the
receivers go on for the waiting time, and the records are written. Every wait has a bound.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from topologies.endpoints.probe_control import (
    READY,
    Child,
    ControlBlock,
    SourceSwitch,
    fork_child,
)
from topologies.endpoints.probe_plan import Direction, ProbePlan
from topologies.endpoints.probe_receiver import RECEIVE_BUFFER_BYTES, run_echo, run_receiver
from topologies.endpoints.probe_sender import START_DELAY_NS, SendLog, Stream, run_sender
from topologies.endpoints.probe_sockets import open_sockets
from topologies.linux import set_priority

SCHEMA_VERSION = 1
CHILD_TIMEOUT_S = 10.0
CLOCK_STEP_NS = 1_000_000
SENDER_NICE, ECHO_NICE, PROGRAM_NICE, RECEIVER_NICE = -20, -15, -10, -5


class ProbeFailedError(RuntimeError):
    """A process of the probe died or did not answer in time."""


class Probe:
    """One run of the probe: its processes and the conversation with its driver."""

    def __init__(self, plan: ProbePlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._spool = folder / "received.spool"
        self._control = ControlBlock(len(plan.flows))
        self._log = SendLog(plan)
        self._children: dict[str, Child] = {}
        self._switch_fd, self._report_fd = os.pipe()
        self._input = b""

    def run(self) -> None:
        """Start, obey the driver until the end, write the records."""
        set_priority(0, PROGRAM_NICE)
        stop_fd = _stop_signals()
        clocks = [_clock_offset_ns()]
        self._start()
        _say({"event": "ready", "begin_ns": time.time_ns() + START_DELAY_NS})
        self._obey(stop_fd)
        self._control.stop_sender()
        sender = self._result("sender")
        self._watch(self._plan.waiting_time_ms / 1000)
        self._control.stop_receivers()
        receiver, echo = self._result("receiver"), self._result("echo")
        clocks.append(_clock_offset_ns())
        self._write(sender, receiver, echo, clocks)
        _say({"event": "done"})

    def _start(self) -> None:
        plan, control = self._plan, self._control
        run = int.from_bytes(os.urandom(4))
        sockets = open_sockets(plan, RECEIVE_BUFFER_BYTES)
        streams = []
        for position, flow in enumerate(plan.flows):
            endpoints = sockets.senders[flow.id]
            control.set_source(position, endpoints[0].site)
            log = self._log.writer(position)
            streams.append(Stream(flow, endpoints, run, plan.payload_bytes, log, self._report_fd))
        self._fork(
            "receiver",
            RECEIVER_NICE,
            lambda ready: run_receiver(plan, sockets.receivers, run, self._spool, control, ready),
        )
        self._fork(
            "echo", ECHO_NICE, lambda ready: run_echo(plan, sockets.echoes, run, control, ready)
        )
        self._fork("sender", SENDER_NICE, lambda ready: run_sender(plan, streams, control, ready))

    def _fork(self, name: str, nice: int, work: Any) -> None:
        child = self._children[name] = fork_child(name, nice, work)
        if not select.select([child.result_fd], [], [], CHILD_TIMEOUT_S)[0]:
            raise ProbeFailedError(f"{name}: not ready after {CHILD_TIMEOUT_S} s")
        if os.read(child.result_fd, len(READY)) != READY:
            raise ProbeFailedError(f"{name}: died at its start")

    def _obey(self, stop_fd: int) -> None:
        """Carry out the driver's orders until it, a signal or the sender's end ends the run."""
        sender = self._children["sender"].result_fd
        others = [self._children[name].result_fd for name in ("receiver", "echo")]
        until = time.monotonic() + self._plan.max_duration_s + CHILD_TIMEOUT_S
        fds = [0, self._switch_fd, stop_fd, sender, *others]
        while (left := until - time.monotonic()) > 0:
            ready = select.select(fds, [], [], left)[0]
            if self._switch_fd in ready:
                self._report_switch()
            if any(fd in ready for fd in others):
                raise ProbeFailedError("receiver or echo: died")
            if stop_fd in ready or sender in ready or (0 in ready and not self._read_orders()):
                return
        raise ProbeFailedError("sender: still at it after max_duration_s")

    def _read_orders(self) -> bool:
        """Carry out what is on standard input; False at its end."""
        data = os.read(0, 65536)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            try:
                self._order_switch(order["switch"], order["site"])
            except (KeyError, ValueError) as error:
                _say({"event": "refused", "reason": str(error)})
        return bool(data)

    def _order_switch(self, flow_id: int, site: str) -> None:
        flow = self._plan.flow(flow_id)
        if flow.direction is not Direction.DOWNLINK or site not in flow.anchors:
            raise ValueError(f"flow {flow_id} is not sent from {site}")
        position, index = self._plan.flows.index(flow), self._plan.site_index(site)
        if not self._control.set_source(position, index):
            raise ValueError(f"flow {flow_id} is sent from {site} already")

    def _report_switch(self) -> None:
        switch = SourceSwitch.unpack(os.read(self._switch_fd, SourceSwitch.STRUCT.size))
        _say(
            {
                "event": "switched",
                "flow": switch.flow,
                "site": self._plan.sites[switch.site].name,
                "first_seq": switch.first_seq,
                "at_ns": switch.at_ns,
            }
        )

    def _watch(self, seconds: float) -> None:
        """Let the receivers go on for the waiting time; none of them may end meanwhile."""
        fds = [self._children[name].result_fd for name in ("receiver", "echo")]
        if select.select(fds, [], [], seconds)[0]:
            raise ProbeFailedError("receiver or echo: died")

    def _result(self, name: str) -> dict[str, Any]:
        child = self._children[name]
        data = b""
        while True:
            if not select.select([child.result_fd], [], [], CHILD_TIMEOUT_S)[0]:
                raise ProbeFailedError(f"{name}: no result after {CHILD_TIMEOUT_S} s")
            part = os.read(child.result_fd, 1 << 20)
            if not part:
                break
            data += part
        os.waitpid(child.pid, 0)
        if not data:
            raise ProbeFailedError(f"{name}: died")
        result: dict[str, Any] = json.loads(data)
        return result

    def _write(
        self,
        sender: dict[str, Any],
        receiver: dict[str, Any],
        echo: dict[str, Any],
        clocks: list[int],
    ) -> None:
        # Here and not above: pyarrow starts threads, which a fork does not carry over.
        from topologies.endpoints import probe_records as records

        records.write_sent(self._folder, self._plan, self._log, sender["flows"])
        records.write_received(self._folder, self._spool)
        records.write_unsent(self._folder, sender.pop("unsent"))
        stats = {
            "schema_version": SCHEMA_VERSION,
            "plan": self._plan.to_dict(),
            "sender": sender,
            "receiver": receiver,
            "echo": echo,
            "realtime_minus_monotonic_ns": {"begin": clocks[0], "end": clocks[1]},
            "clock_stepped": abs(clocks[1] - clocks[0]) > CLOCK_STEP_NS,
        }
        (self._folder / records.STATS_FILE).write_text(json.dumps(stats, indent=2) + "\n")


def _say(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _stop_signals() -> int:
    """A descriptor that becomes readable on SIGTERM or SIGINT."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.detach())
    return reader.detach()


def _clock_offset_ns() -> int:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, from the tightest of a few readings."""
    readings = []
    for _ in range(16):
        before = time.monotonic_ns()
        realtime = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, realtime - (before + after) // 2))
    return min(readings)[1]


def main() -> None:
    """Run the plan given on the command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m topologies.endpoints.probe PLAN.json FOLDER")
    Probe(ProbePlan.load(Path(sys.argv[1])), Path(sys.argv[2])).run()


if __name__ == "__main__":
    main()
