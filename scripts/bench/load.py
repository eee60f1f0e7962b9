"""Packets as fast as one core makes them, and an exact count of those that arrive.

The generator is sendmmsg(2) with everything prepared beforehand. On veth pairs the kernel forwards
within the sender's system call, so that generator and forwarding share one core.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlplane.enforcement import Address
from topologies.endpoints.mmsg import dropped_by_socket
from upf.netns import Namespace

BATCH_PACKETS = 128
SO_ATTACH_FILTER = 26
IPV6_FREEBIND = 78
DRAIN_LIMIT_NS = 20_000_000  # nothing arrived for so long: what is missing is lost
BUFFER_BYTES = 4 << 20

MMSGHDR = np.dtype(
    {
        "names": ["name", "name_len", "iov", "iov_len"],
        "formats": ["u8", "u4", "u8", "u8"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 64,
    }
)
libc = ctypes.CDLL(None, use_errno=True)
libc.sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class Slice:
    """What one slice of load came to."""

    sent: int
    received: int  # by the receiving socket
    received_interface: int  # by the interfaces before it; other packets (neighbours) count too
    elapsed_ns: int  # from the first packet sent to the last one received

    @property
    def lost(self) -> int:
        """Packets that were sent and did not arrive."""
        return self.sent - self.received

    @property
    def rate_pps(self) -> float:
        """Packets a second that came out at the other end."""
        return self.received * 1e9 / self.elapsed_ns


class Load:
    """A generator in one namespace and a counting receiver in another."""

    def __init__(
        self,
        sender: Namespace,
        receiver: Namespace,
        interfaces: Sequence[str],
        sources: Sequence[Address],
        destinations: Sequence[Address],
        payload_bytes: int,
    ) -> None:
        """Prepare packets from every source to every destination, in turn."""
        self._senders = sender.run(lambda: [bound(source) for source in sources])
        self._receiver = receiver.run(lambda: _counting(sources[0].version))
        self._links = receiver.links()
        self._indices = [self._links.link_lookup(ifname=name)[0] for name in interfaces]
        self._payload = np.zeros(payload_bytes, np.uint8)
        self._iov = np.array([self._payload.ctypes.data, payload_bytes], np.uint64)
        port = self._receiver.getsockname()[1]
        self._names = np.stack([sockaddr(address, port) for address in destinations])
        order = np.arange(-(-len(destinations) // BATCH_PACKETS) * BATCH_PACKETS)
        self._headers = np.zeros(order.size, MMSGHDR)
        self._headers["name"] = (
            self._names.ctypes.data + order % len(destinations) * self._names.strides[0]
        )
        self._headers["name_len"] = self._names.shape[1]
        self._headers["iov"] = self._iov.ctypes.data
        self._headers["iov_len"] = 1
        first = self._headers.ctypes.data
        chunks = range(first, first + self._headers.nbytes, BATCH_PACKETS * MMSGHDR.itemsize)
        turns = [(sock.fileno(), chunk) for sock in self._senders for chunk in chunks]
        self.packets_of_all_turns = len(turns) * BATCH_PACKETS
        self._turns = itertools.cycle(turns)

    def run(self, duration_ns: int) -> Slice:
        """Send for this long, then wait for what is under way."""
        sent, received = 0, self._received()
        at_interface = self._received_interface()
        turns, send, clock = self._turns, libc.sendmmsg, time.perf_counter_ns
        begin = clock()
        end = begin + duration_ns
        while clock() < end:
            fd, headers = next(turns)
            count = send(fd, headers, BATCH_PACKETS, 0)
            if count < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"sendmmsg: {os.strerror(code)}")
            sent += count
        last_ns, arrived = clock(), self._received() - received
        while arrived < sent and clock() - last_ns < DRAIN_LIMIT_NS:
            now = self._received() - received
            if now > arrived:
                last_ns, arrived = clock(), now
        return Slice(sent, arrived, self._received_interface() - at_interface, last_ns - begin)

    def close(self) -> None:
        """Close the sockets."""
        for sock in (*self._senders, self._receiver):
            sock.close()
        self._links.close()

    def _received(self) -> int:
        return dropped_by_socket(self._receiver)

    def _received_interface(self) -> int:
        links = self._links.get_links(*self._indices)
        return sum(int(link.get_attr("IFLA_STATS64")["rx_packets"]) for link in links)


def _family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def bound(address: Address) -> socket.socket:
    """Open a socket that sends from an address."""
    sock = socket.socket(_family(address.version), socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    if address.version == 6:  # a prefix that is local by its route is bound to freely in IPv4 only
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    sock.bind((str(address), 0))
    return sock


def _counting(version: int) -> socket.socket:
    """Open a socket that refuses, and by that counts exactly, every datagram delivered to it."""
    sock = socket.socket(_family(version), socket.SOCK_DGRAM)
    refuse_all = np.array([6], np.uint64)  # one classic BPF instruction: return 0 bytes
    program = np.array([1, refuse_all.ctypes.data], np.uint64)  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program.tobytes())
    if version == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("0.0.0.0" if version == 4 else "::", 0))
    return sock


def sockaddr(address: Address, port: int) -> NDArray[np.uint8]:
    """Return struct sockaddr_in or sockaddr_in6."""
    family = _family(address.version).to_bytes(2, "little") + port.to_bytes(2, "big")
    middle, end = (b"", bytes(8)) if address.version == 4 else (bytes(4), bytes(4))
    return np.frombuffer(family + middle + address.packed + end, np.uint8)
