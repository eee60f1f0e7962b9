"""Paced traffic through every lease of a chain, of which each packet is known by its lease.

A packet carries its lease's number, which packet of that lease it is, and when it was sent; the
kernel stamps it on arrival. The receiving socket holds all of it until the sending is over, so
that nobody has to read meanwhile, and on one core nothing competes with sender and kernel.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.bench.chain import Chain, addresses, sides
from scripts.bench.load import MMSGHDR, bound, libc, sockaddr
from scripts.errors import UserError
from topologies.endpoints.mmsg import (
    SO_RCVBUFFORCE,
    SO_TIMESTAMPNS,
    DatagramBatch,
    dropped_by_socket,
)

PAYLOAD = np.dtype([("lease", "<u4"), ("cycle", "<u4"), ("send_ns", "<i8"), ("-", "V48")])
RECEIVE_BUFFER_BYTES = 512 << 20
BURST_PACKETS = 16
READ_PACKETS = 512
STRAGGLERS_S = 0.05
SPIN_NS = 60_000
CLOCK_STEP_NS = 1_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """What was sent and what arrived; times are CLOCK_MONOTONIC, in nanoseconds."""

    send_ns: NDArray[np.int64]  # cycles x leases: just before the burst; 0: not sent
    receive_ns: NDArray[np.int64]  # the same: kernel receive stamp; 0: never received

    @property
    def sent(self) -> NDArray[np.bool_]:
        """Whether a packet was sent."""
        return self.send_ns > 0

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Whether a packet was sent and never received."""
        missing: NDArray[np.bool_] = self.sent & (self.receive_ns == 0)
        return missing


class LeaseTraffic:
    """IPv4 datagrams from every UE to every service of a chain, uplink."""

    def __init__(self, chain: Chain, leases: int, rate_pps: int) -> None:
        """Prepare bursts that go through all leases in turn."""
        ues, services = addresses(leases, 4)
        self._leases, self._interval_ns = leases, BURST_PACKETS * 1_000_000_000 // rate_pps
        self._senders = chain.ue.run(lambda: [bound(ue) for ue in ues])
        self._receiver = chain.anchor.run(_receiving)
        port = self._receiver.getsockname()[1]
        self._names = np.stack([sockaddr(service, port) for service in services])
        self._payload = np.zeros(leases, PAYLOAD)
        self._payload["lease"] = np.arange(leases)
        numbers = np.arange(leases, dtype=np.uint64)
        self._iov = np.empty((leases, 2), np.uint64)
        self._iov[:, 0] = self._payload.ctypes.data + numbers * PAYLOAD.itemsize
        self._iov[:, 1] = PAYLOAD.itemsize
        self._headers = np.zeros(leases, MMSGHDR)
        self._headers["name"] = (
            self._names.ctypes.data + numbers % len(services) * self._names.strides[0]
        )
        self._headers["name_len"] = self._names.shape[1]
        self._headers["iov"] = self._iov.ctypes.data + numbers * self._iov.strides[0]
        self._headers["iov_len"] = 1
        per_ue = sides(leases)[1]
        self._bursts = [
            (self._senders[ue].fileno(), first, min(first + BURST_PACKETS, (ue + 1) * per_ue))
            for ue in range(len(ues))
            for first in range(ue * per_ue, (ue + 1) * per_ue, BURST_PACKETS)
        ]

    def close(self) -> None:
        """Close the sockets."""
        for sock in (*self._senders, self._receiver):
            sock.close()

    def run(self, end_ns: int, at_ns: int, act: Callable[[], None]) -> Record:
        """Send until `end_ns`, doing `act` once at `at_ns`; both CLOCK_MONOTONIC."""
        before_ns, dropped = _realtime_offset_ns(), dropped_by_socket(self._receiver)
        sent: list[NDArray[np.int64]] = []
        self._send(end_ns, at_ns, act, sent)
        time.sleep(STRAGGLERS_S)
        record = Record(np.stack(sent), np.zeros((len(sent), self._leases), np.int64))
        self._read(record.receive_ns, before_ns)
        if dropped_by_socket(self._receiver) != dropped:
            raise UserError("the receiving socket overflowed: use fewer packets a second")
        if abs(_realtime_offset_ns() - before_ns) > CLOCK_STEP_NS:
            raise UserError("the clock was set meanwhile: run this again")
        return record

    def _send(
        self, end_ns: int, at_ns: int, act: Callable[[], None], sent: list[NDArray[np.int64]]
    ) -> None:
        clock, payload = time.monotonic_ns, self._payload
        send, headers, size = libc.sendmmsg, self._headers.ctypes.data, MMSGHDR.itemsize
        due_ns, acted = clock(), False
        while True:
            stamps = np.zeros(self._leases, np.int64)
            sent.append(stamps)
            payload["cycle"] = len(sent) - 1
            for fd, first, after in self._bursts:
                wait_ns = due_ns - clock()
                if wait_ns > SPIN_NS:
                    time.sleep((wait_ns - SPIN_NS) / 1e9)
                while (now_ns := clock()) < due_ns:
                    pass
                if now_ns >= end_ns:
                    return
                if not acted and now_ns >= at_ns:
                    acted = True
                    act()
                    now_ns = clock()
                due_ns = max(due_ns + self._interval_ns, now_ns)  # no bursts to catch up
                payload["send_ns"][first:after] = now_ns
                count = send(fd, headers + first * size, after - first, 0)
                if count != after - first:
                    code = ctypes.get_errno()
                    raise OSError(code, f"sendmmsg sent {count}: {os.strerror(code)}")
                stamps[first:after] = now_ns

    def _read(self, receive_ns: NDArray[np.int64], realtime_offset_ns: int) -> None:
        batch = DatagramBatch(READ_PACKETS, PAYLOAD.itemsize)
        while count := batch.receive(self._receiver.fileno()):
            rows = batch.payload[:count].view(PAYLOAD)[:, 0]
            stamps_ns = batch.stamps_ns(count)
            if not stamps_ns.all():
                raise UserError("a packet came without the kernel's receive stamp")
            place = (rows["cycle"], rows["lease"])
            if receive_ns[place].any():
                raise UserError("a packet came twice")
            receive_ns[place] = stamps_ns - realtime_offset_ns


def _receiving() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind(("0.0.0.0", 0))
    return sock


def _realtime_offset_ns() -> int:
    """Return what CLOCK_REALTIME is ahead of CLOCK_MONOTONIC."""
    return time.time_ns() - time.monotonic_ns()
