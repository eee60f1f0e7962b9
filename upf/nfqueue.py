"""The kernel's packet queue (NFQUEUE) of one network namespace, driven by an event loop.

Only headers are copied here: a packet waits in the kernel until it gets a verdict, and goes with
the queue if this process ends. Nothing here can send it anywhere: RELEASED_MARK and NF_REPEAT let
it run through the gate's chain again, where only a live lease steers it.
"""

import contextlib
import functools
import logging
import select
import warnings
from collections.abc import Callable
from pathlib import Path

from netfilterqueue import NetfilterQueue, Packet

from upf.config import RELEASED_MARK
from upf.netns import in_namespace

HEADER_BYTES = 64  # IPv6 and a little more
RECEIVE_BYTES = 8 << 20  # of the netlink socket
STATISTICS = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
# Columns of that file (net/netfilter/nfnetlink_queue.c): drops for a full queue, a full socket.
QUEUE_DROPPED, USER_DROPPED = 5, 6

log = logging.getLogger(__name__)
Arrived = Callable[[Packet, bytes, int], None]  # packet, key of its flow, bytes of IP


class PacketQueueError(Exception):
    """The queue cannot be had; says why."""


class NfQueue:
    """One queue. `arrived` is called from `read` for each packet, and must give it a verdict."""

    def __init__(self, netns_path: str, number: int, max_packets: int, arrived: Arrived) -> None:
        """Open it. Raises PacketQueueError."""
        self._netns_path = netns_path
        self._number = number
        self._arrived = arrived
        try:
            self._queue = in_namespace(netns_path, functools.partial(self._open, max_packets))
        except OSError as error:
            raise PacketQueueError(
                f"packet queue {number} cannot be opened ({error}): another program has it, or "
                "the kernel has no nfnetlink_queue"
            ) from error

    def fileno(self) -> int:
        """Return what becomes readable when packets have come."""
        return int(self._queue.get_fd())

    def close(self) -> None:
        """Close it; the kernel drops what waits."""
        self._queue.unbind()

    def read(self) -> None:
        """Hand over all that has come. What goes wrong is logged: leases do not depend on it."""
        try:
            self._queue.run(block=False)
        except OSError as error:
            log.error("packet queue %d: %s", self._number, error)

    def wait(self, most_ms: int) -> bool:
        """Return whether a packet comes within so long; blocks."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(most_ms))

    def lost(self) -> int:
        """Return how many packets the kernel could not hand over: no room there, or here."""
        for line in in_namespace(self._netns_path, STATISTICS.read_text).splitlines():
            fields = line.split()
            if int(fields[0]) == self._number:
                return int(fields[QUEUE_DROPPED]) + int(fields[USER_DROPPED])
        return 0

    def _open(self, max_packets: int) -> NetfilterQueue:
        queue = NetfilterQueue()
        with warnings.catch_warnings():  # a smaller buffer loses packets sooner, and counts them
            warnings.simplefilter("ignore", RuntimeWarning)
            queue.bind(
                self._number,
                self._take,
                max_len=max_packets,
                range=HEADER_BYTES,
                sock_len=RECEIVE_BYTES,
            )
        return queue

    def _take(self, packet: Packet) -> None:
        try:
            header = packet.get_payload()
            if header[0] >> 4 == 4:
                key, octets = header[12:20], int.from_bytes(header[2:4], "big")
            else:
                key, octets = header[8:40], 40 + int.from_bytes(header[4:6], "big")
            self._arrived(packet, key, octets)
        except Exception:  # it must not get into the library's C code
            log.exception("packet queue %d: a packet is dropped", self._number)
            with contextlib.suppress(RuntimeError):  # it has a verdict
                packet.drop()


def release(packet: Packet) -> None:
    """Let a packet run through the gate again; it is not parked a second time."""
    packet.set_mark(RELEASED_MARK)
    packet.repeat()
