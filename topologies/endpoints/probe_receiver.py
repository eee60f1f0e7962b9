"""The probe's receiving side: the receiver, which drains and records, and the echo.

The receiver wakes every few milliseconds and takes what is queued at all its sockets; when it
wakes does not matter, for the kernel has stamped each datagram on arrival. The echo answers at
once.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from topologies.endpoints.mmsg import DatagramBatch, dropped_by_socket
from topologies.endpoints.probe_control import ControlBlock
from topologies.endpoints.probe_packet import MAGIC, header_view
from topologies.endpoints.probe_plan import Direction, ProbePlan
from topologies.endpoints.probe_sockets import Endpoint

DRAIN_PERIOD_S = 0.005
RECEIVE_BUFFER_BYTES = 16 << 20
"""Per socket: over a second of 64-byte datagrams at 10,000/s, at some 1 kB of kernel memory each.
"""
BATCH = 256
ECHO_BATCH = 64
STOP_CHECK_S = 0.05

RECEIVED = np.dtype([("recv_ns", "<i8"), ("seq", "<u4"), ("flow", "<u2"), ("site", "u1")])
"""A spooled record: 15 bytes."""
_SPOOL_ROWS = 1 << 16


class Spool:
    """Received records on their way to a file, in blocks: memory stays bounded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rows = np.zeros(_SPOOL_ROWS, RECEIVED)
        self._used = 0

    def add(
        self,
        flow: int,
        seq: NDArray[np.uint32],
        site: NDArray[np.uint8] | int,
        recv_ns: NDArray[np.int64],
    ) -> None:
        """Take records of one flow."""
        if self._used + len(seq) > _SPOOL_ROWS:
            self.flush()
        rows = self._rows[self._used : self._used + len(seq)]
        rows["flow"] = flow
        rows["seq"] = seq
        rows["site"] = site
        rows["recv_ns"] = recv_ns
        self._used += len(seq)

    def flush(self) -> None:
        """Write what is held."""
        self._file.write(self._rows[: self._used].tobytes())
        self._used = 0


class Receiver:
    """Takes datagrams off the receiving sockets and spools them."""

    def __init__(self, plan: ProbePlan, endpoints: list[Endpoint], run: int, spool: Spool) -> None:
        self.received = {flow.id: 0 for flow in plan.flows}
        self.malformed = 0
        self.unstamped = 0
        self._endpoints = endpoints
        self._uplink = {flow.id for flow in plan.flows if flow.direction is Direction.UPLINK}
        self._run = run
        self._spool = spool
        self._batch = DatagramBatch(BATCH, plan.payload_bytes)
        self._header = header_view(self._batch.payload)

    def drain(self) -> None:
        """Take everything that is queued now."""
        for endpoint in self._endpoints:
            fd = endpoint.sock.fileno()
            while count := self._batch.receive(fd):
                self._take(endpoint, count)
                if count < BATCH:
                    break

    def _take(self, endpoint: Endpoint, count: int) -> None:
        header = self._header[:count]
        stamps_ns = self._batch.stamps_ns(count)
        ours = (
            (self._batch.lengths(count) == self._batch.payload.shape[1])
            & (header["magic"] == MAGIC)
            & (header["run"] == self._run)
            & (header["flow"] == endpoint.flow)
        )
        good = ours & (stamps_ns != 0)
        self.malformed += count - int(np.count_nonzero(ours))
        self.unstamped += int(np.count_nonzero(ours)) - int(np.count_nonzero(good))
        self.received[endpoint.flow] += int(np.count_nonzero(good))
        site = endpoint.site if endpoint.flow in self._uplink else header["site"][good]
        self._spool.add(endpoint.flow, header["seq"][good], site, stamps_ns[good])


def run_receiver(
    plan: ProbePlan,
    endpoints: list[Endpoint],
    run: int,
    spool: Path,
    control: ControlBlock,
    ready: Callable[[], None],
) -> dict[str, Any]:
    """Record until told to stop; returns the counts and each socket's overflow as JSON values."""
    with spool.open("wb") as file:
        rows = Spool(file)
        receiver = Receiver(plan, endpoints, run, rows)
        ready()
        begin_s = time.monotonic()
        while not control.receivers_stopped:
            time.sleep(DRAIN_PERIOD_S)
            receiver.drain()
        receiver.drain()
        rows.flush()
    return {
        "cpu_share": _cpu_share(begin_s),
        "received": [{"id": flow, "received": count} for flow, count in receiver.received.items()],
        "malformed": receiver.malformed,
        "unstamped": receiver.unstamped,
        "overflow": overflow_by_socket(plan, endpoints),
    }


def run_echo(
    plan: ProbePlan,
    endpoints: list[Endpoint],
    run: int,
    control: ControlBlock,
    ready: Callable[[], None],
) -> dict[str, Any]:
    """Send each datagram back at once, the site's index stamped into it, until told to stop."""
    batch = DatagramBatch(ECHO_BATCH, plan.payload_bytes)
    header = header_view(batch.payload)
    site_of = {endpoint.sock.fileno(): endpoint.site for endpoint in endpoints}
    echoed = foreign = 0
    errors: dict[str, int] = {}
    poller = select.epoll()
    for fd in site_of:
        poller.register(fd, select.EPOLLIN)
    ready()
    begin_s = time.monotonic()
    while not control.receivers_stopped:
        for fd, _ in poller.poll(STOP_CHECK_S):
            count = batch.receive(fd)
            if not bool(np.all(header["run"][:count] == run)):
                foreign += count
                continue
            header["site"][:count] = site_of[fd]
            first = 0
            while first < count:
                try:
                    first += batch.answer(fd, first, count)
                except OSError as error:
                    name = errno.errorcode.get(error.errno or 0, str(error.errno))
                    errors[name] = errors.get(name, 0) + 1
                    first += 1
                    echoed -= 1
            echoed += count
    return {
        "cpu_share": _cpu_share(begin_s),
        "echoed": echoed,
        "foreign": foreign,
        "send_errors": errors,
        "overflow": overflow_by_socket(plan, endpoints),
    }


def overflow_by_socket(plan: ProbePlan, endpoints: list[Endpoint]) -> list[dict[str, Any]]:
    """Per socket, the datagrams that it dropped because nobody had drained it."""
    return [
        {
            "flow": endpoint.flow,
            "site": plan.sites[endpoint.site].name,
            "dropped": dropped_by_socket(endpoint.sock),
        }
        for endpoint in endpoints
    ]


def _cpu_share(begin_s: float) -> float:
    return round(time.process_time() / max(time.monotonic() - begin_s, 1e-9), 4)
