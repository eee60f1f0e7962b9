"""HTB classes as the kernel is asked for them: packed requests, and the socket they go through.

A class of a lease comes and goes with it, on the hot path of a COMMIT, so these requests are packed
by hand, as `upf.elements` does for set elements; a test holds them equal, byte for byte, to what
pyroute2 makes of the same attributes. Numbers and names are those of linux/pkt_sched.h.

HTB counts Ethernet frames, QoS flows' rates are of IP packets: `frame_bytes_per_s` turns one into
the other for packets of full size. Of smaller packets a little less fits in, never more.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_DELTCLASS, RTM_NEWQDISC, RTM_NEWTCLASS

from upf.attributes import NLMSG, attribute
from upf.netns import in_namespace

# The tree a15:, a major number that is nobody's habit, as 1: is, and its capacity a15:1.
ROOT, WHOLE = 0xA15_0000, 0xA15_0001

# Behind a busy processor a class may be late by a timer tick (4 ms at HZ=250) or two; what it may
# catch up afterwards is 0.8 % of a second.
BURST_MS = 8
# Each class gets as many bytes a round as two full packets have, whatever its rate: the shares of
# what is left are equal.
QUANTUM_BYTES = 3_028
QUEUE_MS = 100  # a longer queue would only be late
LEAST_QUEUE_PACKETS, MOST_QUEUE_PACKETS = 16, 10_000

_FRAME_BYTES, _PACKET_BYTES = 1_514, 1_500
_NS_PER_TICK = 64  # of packet schedulers
# So that the kernel asks for no rate table; what describes one is there as tc(8) has it.
_LINKLAYER_ETHERNET, _CELL_LOG, _CELL_ALIGN = 1, 3, -1
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_HTB_PARMS, _TCA_HTB_RATE64, _TCA_HTB_CEIL64 = 1, 6, 7
_MOST32 = (1 << 32) - 1
_TCMSG = struct.Struct("=BxxxiIII")  # family, interface index, handle, parent, info
_HTB = struct.Struct("=BBHhHIBBHhHIIIIII")  # tc_htb_opt: rate, ceil, buffers, quantum, level, prio
_U64, _U32 = struct.Struct("=Q"), struct.Struct("=I")
_HTB_KIND, _PFIFO_KIND = attribute(_TCA_KIND, b"htb\0"), attribute(_TCA_KIND, b"pfifo\0")

_NETLINK_CAP_ACK, _SOL_NETLINK, _NLMSG_ERROR = 10, 270, 2
_ANSWER_TIMEOUT_S = 5
_ERROR, _TIMEVAL = struct.Struct("=i"), struct.Struct("@ll")
_RECEIVE_BYTES = 1 << 18
_MOST_REQUESTS = 512  # in one send: their errors must find room in the receive buffer


class HtbError(Exception):
    """The kernel refused a class."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"HTB refused a class: {os.strerror(code)}")


class HtbClass(NamedTuple):
    """A class: at least `rate`, at most `ceil`, both in bytes/s of Ethernet frames."""

    class_id: int
    parent: int
    rate: int
    ceil: int
    priority: int  # 0 to 7; 0 is served first


def queue_packets(ceil: int) -> int:
    """Return how many packets a class queues: what it sends in QUEUE_MS, within limits."""
    packets = ceil * QUEUE_MS // (1_000 * _FRAME_BYTES)
    return min(max(packets, LEAST_QUEUE_PACKETS), MOST_QUEUE_PACKETS)


def frame_bytes_per_s(rate_bps: int) -> int:
    """Return the rate of frames that carries this rate of IP packets."""
    return rate_bps * _FRAME_BYTES // (8 * _PACKET_BYTES)


def encode_class(index: int, wanted: HtbClass, number: int, flags: int = 0) -> bytes:
    """Encode the request for a class on an interface; one of that id becomes like it."""
    rate, ceil = wanted.rate, wanted.ceil
    burst_ticks = BURST_MS * 1_000_000 // _NS_PER_TICK
    options = attribute(
        _TCA_HTB_PARMS,
        _HTB.pack(
            *(_CELL_LOG, _LINKLAYER_ETHERNET, 0, _CELL_ALIGN, 0, min(rate, _MOST32)),
            *(_CELL_LOG, _LINKLAYER_ETHERNET, 0, _CELL_ALIGN, 0, min(ceil, _MOST32)),
            *(burst_ticks, burst_ticks, QUANTUM_BYTES, 0, wanted.priority),
        ),
    )
    if rate > _MOST32:
        options += attribute(_TCA_HTB_RATE64, _U64.pack(rate))
    if ceil > _MOST32:
        options += attribute(_TCA_HTB_CEIL64, _U64.pack(ceil))
    attributes = _HTB_KIND + attribute(_TCA_OPTIONS, options)
    flags |= NLM_F_CREATE
    return _request(RTM_NEWTCLASS, flags, index, wanted.class_id, wanted.parent, attributes, number)


def encode_queue(index: int, wanted: HtbClass, number: int, flags: int = 0) -> bytes:
    """Encode the request for the first-in-first-out queue of a class."""
    options = attribute(_TCA_OPTIONS, _U32.pack(queue_packets(wanted.ceil)))
    handle = (wanted.class_id & 0xFFFF) << 16
    flags |= NLM_F_CREATE | NLM_F_REPLACE
    attributes = _PFIFO_KIND + options
    return _request(RTM_NEWQDISC, flags, index, handle, wanted.class_id, attributes, number)


def encode_removal(index: int, class_id: int, number: int, flags: int = 0) -> bytes:
    """Encode the request to remove a class, with what is queued in it."""
    return _request(RTM_DELTCLASS, flags, index, class_id, 0, b"", number)


def _request(
    kind: int, flags: int, index: int, handle: int, parent: int, attributes: bytes, number: int
) -> bytes:
    length = NLMSG.size + _TCMSG.size + len(attributes)
    return (
        NLMSG.pack(length, kind, NLM_F_REQUEST | flags, number, 0)
        + _TCMSG.pack(0, index, handle, parent, 0)
        + attributes
    )


_Request = Callable[[int, int], bytes]  # number, flags -> what to send


class HtbSocket:
    """Makes and removes classes in one network namespace."""

    def __init__(self, netns_path: str) -> None:
        self._socket = in_namespace(netns_path, _open)
        self._next_number = 1

    def close(self) -> None:
        """Close the socket. Classes live on."""
        self._socket.close()

    def make(self, classes: Iterable[tuple[int, HtbClass]]) -> None:
        """Make classes (interface index, class) with their queues, or make them like that.

        Raises HtbError for the first that the kernel refused; the others are there.
        """
        requests: list[_Request] = []
        for index, wanted in classes:
            requests.append(partial(encode_class, index, wanted))
            if wanted.class_id != WHOLE:  # packets wait in the leaves
                requests.append(partial(encode_queue, index, wanted))
        for code in self._exchange(requests):
            raise HtbError(code)

    def remove(self, classes: Iterable[tuple[int, int]]) -> None:
        """Remove classes (interface index, class id); those that are not there are no error."""
        requests: list[_Request] = [
            partial(encode_removal, index, class_id) for index, class_id in classes
        ]
        for code in self._exchange(requests):
            if code not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):  # no class, link, or tree
                raise HtbError(code)

    def _exchange(self, requests: list[_Request]) -> list[int]:
        """Send requests; return the error codes of those that failed."""
        codes: list[int] = []
        for start in range(0, len(requests), _MOST_REQUESTS):
            part = requests[start : start + _MOST_REQUESTS]
            first, last = self._next_number, self._next_number + len(part) - 1
            self._next_number = last + 1 if last < 1 << 30 else 1
            data = b"".join(
                encode(number, NLM_F_ACK if number == last else 0)
                for number, encode in enumerate(part, first)
            )
            self._socket.send(data)
            codes += self._answers(first, last)
        return codes

    def _answers(self, first: int, last: int) -> list[int]:
        codes: list[int] = []
        while True:
            answer = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset + NLMSG.size <= len(answer):
                length, kind, _, number, _ = NLMSG.unpack_from(answer, offset)
                if kind == _NLMSG_ERROR and first <= number <= last:
                    code = -int(_ERROR.unpack_from(answer, offset + NLMSG.size)[0])
                    if code:
                        codes.append(code)
                    if number == last:
                        return codes
                offset += (length + 3) & ~3


def _open() -> socket.socket:
    handle = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    handle.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_ANSWER_TIMEOUT_S, 0))
    handle.bind((0, 0))
    return handle
