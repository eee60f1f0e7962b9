"""The probe's sender: one process that paces all flows on one timer.

All flows send once in every interval, one after another at `STAGGER_NS`: that leaves the process
the rest of the interval to sleep in, and the machine a core to work with. It sleeps until shortly
before a packet is due and spins for the rest. Where it has time to sleep it runs under SCHED_FIFO,
so that nothing on a busy machine keeps it waiting; where it has not it must not, for the kernel
takes a real-time process that never sleeps off its core for 50 ms in every second (Linux 6.18).

A packet whose time has passed by more than `MAX_LATE_NS` is not sent at all: what was missed is
reported, never made up for in a burst. Sequence numbers count the packets sent: they have no holes.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topologies.endpoints.probe_control import ControlBlock, SourceSwitch
from topologies.endpoints.probe_packet import MAGIC, STRUCT
from topologies.endpoints.probe_plan import Flow, ProbePlan
from topologies.endpoints.probe_sockets import Endpoint

SPIN_NS = 30_000
REALTIME_BUSY_SHARE = 0.85
"""Above this share of its time a sender stays out of SCHED_FIFO."""
REALTIME_PRIORITY = 10
STAGGER_NS = 15_000
"""About what it takes to send one packet."""
MAX_LATE_NS = 2_000_000
"""Virtual machines are stopped for up to about 1 ms at a time by their host: that much is caught
up with (the timer error tells of it). At rates below 500/s one interval is allowed instead."""
START_DELAY_NS = 20_000_000
"""From the sender's readiness to its first packet."""
MAX_UNSENT_RECORDS = 100_000
"""Beyond these, unsent packets are counted only."""
MISSED = 0
"""The `errno` of an unsent packet that was never tried, being too late."""

_ERROR_HISTOGRAM_US = 100_000


class SendLog:
    """The send times of each flow, in memory that the parent shares.

    Packet `seq` of the flow at position p was sent at `send_ns(p)[seq]`. Pages are touched as they
    are used; the most they can take is 8 bytes x rate x flows x max duration.
    """

    def __init__(self, plan: ProbePlan) -> None:
        self.capacity = plan.max_packets_per_flow
        self._memory = [mmap.mmap(-1, 8 * self.capacity) for _ in plan.flows]

    def writer(self, position: int) -> memoryview:
        """The int64 send times of a flow, to be filled."""
        return memoryview(self._memory[position]).cast("q")

    def send_ns(self, position: int, count: int) -> NDArray[np.int64]:
        """The first `count` send times of a flow, CLOCK_REALTIME ns."""
        return np.frombuffer(self._memory[position], np.int64, count)


@dataclass(frozen=True, slots=True)
class Unsent:
    """Packets that were due and not sent."""

    flow: int
    at_ns: int
    errno: int
    """The system call's error, or `MISSED`."""
    count: int


class Stream:
    """The sending side of one flow."""

    def __init__(
        self,
        flow: Flow,
        endpoints: list[Endpoint],
        run: int,
        payload_bytes: int,
        log: memoryview,
        report_fd: int,
    ) -> None:
        self.id = flow.id
        self.seq = 0
        self.site = endpoints[0].site
        self.missed = 0
        self.errors: dict[int, int] = {}
        self.switches: list[SourceSwitch] = []
        self._sends = {endpoint.site: endpoint.sock.send for endpoint in endpoints}
        self._send = self._sends[self.site]
        self._run = run
        self._buffer = bytearray(payload_bytes)
        self._log = log
        self._report_fd = report_fd

    def send(self) -> int:
        """Send the next packet; returns 0, or the errno of a packet that could not be sent."""
        seq = self.seq
        at_ns = time.time_ns()
        STRUCT.pack_into(self._buffer, 0, MAGIC, self._run, at_ns, seq, self.id, self.site)
        try:
            self._send(self._buffer)
        except OSError as error:
            code = error.errno or errno.EIO
            self.errors[code] = self.errors.get(code, 0) + 1
            return code
        self._log[seq] = at_ns
        self.seq = seq + 1
        return 0

    def switch(self, site: int) -> None:
        """Send from `site` from the next packet on, and report it."""
        self.site = site
        self._send = self._sends[site]
        switch = SourceSwitch(self.id, site, self.seq, time.time_ns())
        self.switches.append(switch)
        os.write(self._report_fd, switch.pack())


def run_sender(
    plan: ProbePlan,
    streams: list[Stream],
    control: ControlBlock,
    ready: Callable[[], None],
) -> dict[str, Any]:
    """Send until told to stop or `max_duration_s` is over; returns what was sent as JSON values."""
    shared, stop_at, source_at = control.sender_view()
    monotonic_ns, sleep = time.monotonic_ns, time.sleep
    count = len(streams)
    interval_ns = plan.interval_ns
    stagger_ns = min(STAGGER_NS, interval_ns // count)
    max_late_ns = max(MAX_LATE_NS, interval_ns)
    histogram = [0] * (_ERROR_HISTOGRAM_US + 1)
    max_error_ns = 0
    unsent: list[Unsent] = []
    packets = plan.max_packets_per_flow * count
    if plan.sender_cpu is not None:
        os.sched_setaffinity(0, {plan.sender_cpu})
    realtime = _go_realtime((SPIN_NS + count * stagger_ns) / interval_ns)
    ready()
    begin_ns = monotonic_ns() + START_DELAY_NS
    begin_cpu_s = time.process_time()
    turn = 0
    while turn < packets:
        due_ns = begin_ns + turn // count * interval_ns + turn % count * stagger_ns
        now_ns = monotonic_ns()
        if due_ns - now_ns > SPIN_NS:
            sleep((due_ns - now_ns - SPIN_NS) / 1e9)
        while (now_ns := monotonic_ns()) < due_ns:
            pass
        if shared[stop_at]:
            break
        error_ns = now_ns - due_ns
        if error_ns > max_late_ns:
            until = min(packets, (now_ns - begin_ns) * count // interval_ns)
            _miss(streams, turn, until, unsent)
            turn = until
            continue
        position = turn % count
        stream = streams[position]
        site = shared[source_at + position]
        if site != stream.site:
            stream.switch(site)
        code = stream.send()
        if code and len(unsent) < MAX_UNSENT_RECORDS:
            unsent.append(Unsent(stream.id, time.time_ns(), code, 1))
        error_us = error_ns // 1000
        histogram[error_us if error_us < _ERROR_HISTOGRAM_US else _ERROR_HISTOGRAM_US] += 1
        if error_ns > max_error_ns:
            max_error_ns = error_ns
        turn += 1
    duration_s = (monotonic_ns() - begin_ns) / 1e9
    return {
        "duration_s": duration_s,
        "realtime": realtime,
        "cpu_share": round((time.process_time() - begin_cpu_s) / max(duration_s, 1e-9), 4),
        "timer_error_us": {**_quantiles(histogram), "max": max_error_ns / 1000},
        "flows": [
            {
                "id": stream.id,
                "sent": stream.seq,
                "achieved_rate_pps": round(stream.seq / max(duration_s, 1e-9), 3),
                "missed_sends": stream.missed,
                "send_errors": {
                    errno.errorcode.get(code, str(code)): n for code, n in stream.errors.items()
                },
                "switches": [
                    {"site": s.site, "first_seq": s.first_seq, "at_ns": s.at_ns}
                    for s in stream.switches
                ],
            }
            for stream in streams
        ],
        "unsent": [[u.flow, u.at_ns, u.errno, u.count] for u in unsent],
    }


def _go_realtime(busy_share: float) -> bool:
    """Enter SCHED_FIFO if it suits the load and is allowed; says whether it was."""
    if busy_share > REALTIME_BUSY_SHARE:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))
    except PermissionError:
        return False
    return True


def _miss(streams: list[Stream], turn: int, until: int, unsent: list[Unsent]) -> None:
    """Count the turns from `turn` to `until` as missed, flow by flow."""
    at_ns = time.time_ns()
    whole, rest = divmod(until - turn, len(streams))
    for step in range(len(streams)):
        stream = streams[(turn + step) % len(streams)]
        missed = whole + (step < rest)
        stream.missed += missed
        if missed and len(unsent) < MAX_UNSENT_RECORDS:
            unsent.append(Unsent(stream.id, at_ns, MISSED, missed))


def _quantiles(histogram: list[int]) -> dict[str, float]:
    """p50 and p99 of a histogram with bins of 1 µs: the upper edge of the bin."""
    total = np.cumsum(histogram)
    if not total[-1]:
        return {"p50": 0.0, "p99": 0.0}
    return {
        f"p{percent}": float(np.searchsorted(total, total[-1] * percent / 100) + 1)
        for percent in (50, 99)
    }
