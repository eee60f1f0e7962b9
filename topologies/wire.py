"""The program of a delayed link where the kernel has no netem: `python -m topologies.wire`.

It joins pairs of interfaces in its network namespace and forwards every frame unchanged and in
order, a fixed time after the kernel received it. Frames stay as the kernel holds them: with the
virtio header, segmentation offloads and unfinished checksums survive. Frames are read and written
in batches, from and to the same memory; Python touches none of them.

It says `ready` on standard output, answers each line on standard input with its statistics (one
line of JSON), and ends when standard input does.
"""

import argparse
import ctypes
import errno
import json
import mmap
import os
import select
import socket
import sys
import time

import numpy as np

from topologies import linux
from topologies.shaping import delay_buffer_packets

_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_MR_PROMISC = 1, 1
_PACKET_STATISTICS = 6
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_SO_TIMESTAMPNS = 35
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ETH_P_ALL = 0x0003
_MSG_DONTWAIT = 0x40

_SOCKET_BUFFER_BYTES = 64 << 20
_SLOT_BYTES = 65_536 + 256  # the largest segmentation-offloaded frame and its headers
_BATCH = 64
_GRAIN_NS = 100_000  # due frames are gathered for this long, less on short delays
_LONGEST_SLEEP_NS = 5_000_000  # sockets are emptied at least this often

_IOVEC = np.dtype([("base", "u8"), ("length", "u8")])
_MMSGHDR = np.dtype(
    [
        ("name", "u8"),
        ("name_length", "u8"),
        ("iov", "u8"),
        ("iov_count", "u8"),
        ("control", "u8"),
        ("control_length", "u8"),
        ("flags", "u8"),
        ("length", "u8"),
    ]
)
_TIMESTAMP = np.dtype([("header", "u8", (2,)), ("seconds", "i8"), ("nanoseconds", "i8")])


class Direction:
    """Frames from one interface to another: a ring of slots between two sockets."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay_ns: int) -> None:
        self.source = source
        self._sink = sink
        self._delay_ns = delay_ns
        self._slots = slots = delay_buffer_packets(delay_ns / 1e6)
        self._memory = mmap.mmap(-1, slots * _SLOT_BYTES)  # pages are taken when touched
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        frames = base + np.arange(slots, dtype="u8") * np.uint64(_SLOT_BYTES)
        self._times = np.zeros(slots, _TIMESTAMP)
        self._due_ns = np.zeros(slots, "i8")
        self._in_iov, self._in = _headers(frames)
        self._in_iov["length"] = _SLOT_BYTES
        self._in["control"] = _addresses(self._times)
        self._in["control_length"] = _TIMESTAMP.itemsize
        self._out_iov, self._out = _headers(frames)
        self._head = 0
        self._held = 0
        self.forwarded = 0
        self.dropped = 0

    def next_due_ns(self) -> int | None:
        """When the oldest held frame is to leave (CLOCK_REALTIME), or None."""
        return int(self._due_ns[self._head]) if self._held else None

    def receive(self) -> None:
        """Take what the kernel has for us, as far as there is room. The rest waits there."""
        while self._held < self._slots:
            first = (self._head + self._held) % self._slots
            room = min(_BATCH, self._slots - first, self._slots - self._held)
            count = linux.libc.recvmmsg(
                self.source.fileno(), _pointer(self._in, first), room, _MSG_DONTWAIT, None
            )
            if count <= 0:
                if count < 0 and ctypes.get_errno() == errno.EINVAL:
                    self.dropped += 1  # a frame of a kind the virtio header cannot describe
                    continue
                return
            new = slice(first, first + count)
            self._out_iov["length"][new] = self._in["length"][new] & 0xFFFF_FFFF
            self._in["control_length"][new] = _TIMESTAMP.itemsize
            times = self._times[new]
            due = times["seconds"] * 1_000_000_000 + times["nanoseconds"] + self._delay_ns
            # Should the wall clock be set back meanwhile, nothing is held longer than the delay.
            self._due_ns[new] = np.minimum(due, time.time_ns() + self._delay_ns)
            self._held += count
            if count < room:
                return

    def send(self, now_ns: int) -> None:
        """Send the frames that are due."""
        while self._held and self._due_ns[self._head] <= now_ns:
            end = min(self._head + min(self._held, _BATCH), self._slots)
            late = self._due_ns[self._head : end] > now_ns
            due = int(late.argmax()) if late.any() else end - self._head
            sent = linux.libc.sendmmsg(
                self._sink.fileno(), _pointer(self._out, self._head), due, _MSG_DONTWAIT
            )
            if sent < 0:
                if ctypes.get_errno() in (errno.EAGAIN, errno.ENOBUFS):
                    return  # the queue below is full: tried again at the next turn
                self.dropped += 1
                sent = 1
            else:
                self.forwarded += sent
            self._head = (self._head + sent) % self._slots
            self._held -= sent

    def statistics(self) -> dict[str, int]:
        """Frames so far; `dropped` counts those for which there was no room."""
        # Reading the socket's counters resets them.
        counts = self.source.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self.dropped += int.from_bytes(counts[4:8], sys.byteorder)
        return {"forwarded": self.forwarded, "held": self._held, "dropped": self.dropped}


def _addresses(records: np.ndarray) -> np.ndarray:
    steps = np.arange(len(records), dtype="u8") * np.uint64(records.itemsize)
    return np.uint64(records.ctypes.data) + steps


def _headers(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An iovec and an mmsghdr for each frame slot."""
    iov = np.zeros(len(frames), _IOVEC)
    iov["base"] = frames
    headers = np.zeros(len(frames), _MMSGHDR)
    headers["iov"] = _addresses(iov)
    headers["iov_count"] = 1
    return iov, headers


def _pointer(records: np.ndarray, index: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(records.ctypes.data + index * records.itemsize)


def _open(interface: str) -> socket.socket:
    # Protocol 0 first: nothing is received before every option is set.
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    packets.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    packets.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _SOCKET_BUFFER_BYTES)
    packets.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER_BYTES)
    index = socket.if_nametoindex(interface)
    membership = index.to_bytes(4, sys.byteorder) + _PACKET_MR_PROMISC.to_bytes(2, sys.byteorder)
    packets.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership + bytes(10))
    packets.bind((interface, _ETH_P_ALL))
    return packets


def relay(pairs: list[tuple[str, str]], delay_ns: int) -> None:
    """Forward between the interfaces of each pair until standard input ends."""
    directions = []
    for first, second in pairs:
        a, b = _open(first), _open(second)
        directions += [Direction(a, b, delay_ns), Direction(b, a, delay_ns)]
    sources = [direction.source for direction in directions]
    grain_ns = min(_GRAIN_NS, delay_ns // 20)
    control = sys.stdin.fileno()
    print("ready", flush=True)
    while True:
        now_ns = time.time_ns()
        for direction in directions:
            direction.receive()
            direction.send(now_ns)
        due = [at for direction in directions if (at := direction.next_due_ns()) is not None]
        if due:
            wait_ns = min(max(min(due) - time.time_ns(), grain_ns), _LONGEST_SLEEP_NS)
            readable, _, _ = select.select([control], [], [], wait_ns / 1e9)
        else:
            readable, _, _ = select.select([control, *sources], [], [])
        if control in readable:
            if not os.read(control, 4096):
                return
            print(json.dumps([direction.statistics() for direction in directions]), flush=True)


def main() -> None:
    """Parse the command line and relay."""
    parser = argparse.ArgumentParser(prog="python -m topologies.wire", description=__doc__)
    parser.add_argument("--delay-us", type=int, required=True, help="one way, microseconds")
    parser.add_argument("pairs", nargs="+", metavar="INTERFACE:INTERFACE")
    arguments = parser.parse_args()
    linux.prctl(linux.PR_SET_TIMERSLACK, 1)
    pairs = [(a, b) for a, _, b in (pair.partition(":") for pair in arguments.pairs)]
    relay(pairs, arguments.delay_us * 1000)


if __name__ == "__main__":
    main()
