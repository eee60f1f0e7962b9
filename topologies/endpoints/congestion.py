"""Traffic that fills a cell: paced datagrams whose rate and delay are measured, and greedy TCP.

Every flow's sender and receiver are sockets in the namespaces of their hosts; all of them run in
four processes of their own, so that one does not wait for another. Delays are from the sender's
clock to the kernel's receive stamp (all namespaces share one clock).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import selectors
import socket
import struct
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from upf.netns import in_namespace

_HEAD = struct.Struct("!IQq")  # flow, number, send time (CLOCK_REALTIME, ns)
_TIMESPEC = struct.Struct("@qq")
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_RECEIVE_BUFFER_BYTES = 8 << 20
_SAMPLE_S = 0.1  # between two counts of a stream's bytes
_STOP_S = 10.0
HEADER_BYTES = {4: 28, 6: 48}  # of a datagram, IP and UDP

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedFlow:
    """Datagrams of one size at one rate."""

    number: int
    source: str  # path of the sender's network namespace
    source_address: str
    sink: str
    sink_address: str
    port: int
    rate_bps: int  # of IP packets
    ip_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyStreams:
    """TCP connections from a UE to a service that send all they can, one way."""

    streams: int
    ue: str  # path of the network namespace
    ue_address: str
    server: str
    service_address: str
    port: int
    uplink: bool


@dataclass(frozen=True, slots=True)
class Records:
    """What was sent and received. Instants are CLOCK_REALTIME, ns."""

    sent: dict[str, array[int]]  # flow, seq, send_ns
    received: dict[str, array[int]]  # flow, seq, recv_ns
    streams: dict[str, array[int]]  # at_ns, bytes (of TCP payload, all streams, since before)
    start_ns: int  # paced flows begin
    end_ns: int


def run(
    paced: Sequence[PacedFlow],
    greedy: GreedyStreams,
    warm_up_s: float,
    run_s: float,
    sender_cpu: int | None,
) -> Records:
    """Let the streams fill the cell for `warm_up_s`, then all flows run for `run_s`.

    `sender_cpu`: the CPU for the sender of the paced flows alone; None: any.
    """
    with _Part(_count_streams, greedy) as sink, _Part(_receive, paced) as receiver:
        sink.ready()
        receiver.ready()
        with _Part(_fill, greedy):
            time.sleep(warm_up_s)
            with _Part(_send, paced, run_s, sender_cpu) as sender:
                sent = sender.result()
            time.sleep(0.5)  # for what still waits
        start_ns = sent["send_ns"][0]
        end_ns = start_ns + int(run_s * 1e9)
        return Records(sent, receiver.result(), sink.result(), start_ns, end_ns)


class _Part:
    """A process that runs one function until it is told to stop, and returns what that returns."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._here, there = _fork.Pipe()
        self._process = _fork.Process(target=function, args=(there, *arguments), daemon=True)

    def __enter__(self) -> _Part:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def ready(self) -> None:
        """Wait until its sockets are open."""
        self._here.recv()

    def result(self) -> dict[str, array[int]]:
        """Tell it to stop, and return what it has recorded."""
        self._here.send(None)
        columns: dict[str, array[int]] = self._here.recv()
        return columns


def _open(netns: str, address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        handle = socket.socket(family, kind)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        handle.bind((address, port))
        return handle

    return in_namespace(netns, make)


def _send(pipe: Connection, flows: Sequence[PacedFlow], run_s: float, cpu: int | None) -> None:
    """Send every flow's datagrams when they are due; one that finds no room is lost here."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    sockets, payloads, intervals_ns = {}, {}, {}
    for flow in flows:
        handle = _open(flow.source, flow.source_address, flow.port, socket.SOCK_DGRAM)
        handle.connect((flow.sink_address, flow.port))
        handle.setblocking(False)
        sockets[flow.number] = handle
        version = 6 if ":" in flow.sink_address else 4
        payloads[flow.number] = bytes(flow.ip_bytes - HEADER_BYTES[version] - _HEAD.size)
        intervals_ns[flow.number] = flow.ip_bytes * 8 * 1_000_000_000 // flow.rate_bps
    columns = {name: array("q") for name in ("flow", "seq", "send_ns")}
    counts = dict.fromkeys(sockets, 0)
    began_ns = time.monotonic_ns()
    due_ns = {number: began_ns + number * 37_000 for number in sockets}  # not all at once
    until_ns = began_ns + int(run_s * 1e9)
    while True:
        number = min(due_ns, key=due_ns.__getitem__)
        if due_ns[number] >= until_ns:
            break
        wait_ns = due_ns[number] - time.monotonic_ns()
        if wait_ns > 60_000:
            time.sleep((wait_ns - 60_000) / 1e9)
            continue
        now_ns = time.time_ns()
        head = _HEAD.pack(number, counts[number], now_ns)
        for name, value in (("flow", number), ("seq", counts[number]), ("send_ns", now_ns)):
            columns[name].append(value)
        counts[number] += 1
        due_ns[number] += intervals_ns[number]
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            sockets[number].send(head + payloads[number])
    pipe.recv()
    pipe.send(columns)


def _receive(pipe: Connection, flows: Sequence[PacedFlow]) -> None:
    """Record every datagram that comes in, until told to stop."""
    columns = {name: array("q") for name in ("flow", "seq", "recv_ns")}
    with selectors.DefaultSelector() as selector:
        for flow in flows:
            handle = _open(flow.sink, flow.sink_address, flow.port, socket.SOCK_DGRAM)
            handle.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
            handle.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            handle.setblocking(False)
            selector.register(handle, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        pipe.send(None)
        while True:
            for key, _ in selector.select():
                if key.fileobj is pipe:
                    pipe.recv()
                    pipe.send(columns)
                    return
                assert isinstance(key.fileobj, socket.socket)
                _drain(key.fileobj, columns)


def _drain(handle: socket.socket, columns: dict[str, array[int]]) -> None:
    for _ in range(64):  # and then the others
        try:
            data, ancillary, _, _ = handle.recvmsg(2_048, 64)
        except BlockingIOError:
            return
        number, seq, _ = _HEAD.unpack_from(data)
        seconds, ns = _TIMESPEC.unpack(ancillary[0][2])
        for name, value in (("flow", number), ("seq", seq), ("recv_ns", seconds * 10**9 + ns)):
            columns[name].append(value)


def _fill(pipe: Connection, greedy: GreedyStreams) -> None:
    """Connect from the UE; whichever side sends, sends without end."""
    del pipe  # it ends when it is killed
    streams = []
    for number in range(greedy.streams):
        handle = _open(greedy.ue, greedy.ue_address, 0, socket.SOCK_STREAM)
        handle.settimeout(_STOP_S)
        handle.connect((greedy.service_address, greedy.port))
        streams.append(
            threading.Thread(target=_pump if greedy.uplink else _swallow, args=(handle,))
        )
        streams[number].start()
    for stream in streams:
        stream.join()


def _count_streams(pipe: Connection, greedy: GreedyStreams) -> None:
    """Accept at the server, send or receive there, and sample how much has got through."""
    listener = _open(greedy.server, greedy.service_address, greedy.port, socket.SOCK_STREAM)
    listener.listen(greedy.streams)
    columns = {name: array("q") for name in ("at_ns", "bytes")}
    accepted: list[socket.socket] = []
    received: list[list[int]] = []

    def accept() -> None:
        while True:
            handle, _ = listener.accept()
            count = [0]
            accepted.append(handle)
            received.append(count)
            target, arguments = (_swallow, (handle, count)) if greedy.uplink else (_pump, (handle,))
            threading.Thread(target=target, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    pipe.send(None)
    before = 0
    while not pipe.poll(_SAMPLE_S):
        if greedy.uplink:
            total = sum(count[0] for count in received)
        else:
            total = sum(map(_acknowledged, accepted))
        columns["at_ns"].append(time.time_ns())
        columns["bytes"].append(total - before)
        before = total
    pipe.recv()
    pipe.send(columns)


def _acknowledged(handle: socket.socket) -> int:
    """Return how many bytes the other side of a connection has acknowledged (tcp_info)."""
    information = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(information[120:128], "little")


def _pump(handle: socket.socket) -> None:
    """Send until the other side goes; whoever counts may ask the socket afterwards still."""
    handle.settimeout(None)
    data = bytes(1 << 16)
    with contextlib.suppress(OSError):
        while True:
            handle.sendall(data)


def _swallow(handle: socket.socket, count: list[int] | None = None) -> None:
    handle.settimeout(None)
    try:
        while received := len(handle.recv(1 << 18)):
            if count is not None:
                count[0] += received
    except OSError:
        pass
    handle.close()
