"""Which way the kernel routes to an address, asked by the hundred; and word of what changes.

Packed by hand as lease elements are: pyroute2 takes half a millisecond a question.
"""

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from pyroute2.netlink import NLM_F_REQUEST

from upf.attributes import NLA, NLMSG, attribute
from upf.netns import in_namespace

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
NLMSG_ERROR = 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_VIA, RTA_MULTIPATH = 1, 4, 5, 18, 9
RTN_UNICAST = 1
# linux/rtnetlink.h: links, and routes and rules of both families (as a mask: group - 1 is the bit)
GROUPS = 1 << 0 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18
MOST_QUESTIONS = 128
RECEIVE_BYTES = 1 << 17
BUFFER_BYTES = 1 << 20
ANSWER_TIMEOUT_S = 5

_RTMSG = struct.Struct("=8BI")  # family, lengths of prefixes, tos, table, protocol, scope, type
_U32 = struct.Struct("=I")

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Hop:
    """Where a packet goes next: an interface, and the neighbour on it."""

    index: int
    neighbour: bytes  # packed address


class Routes:
    """Asks one network namespace for routes, and hears of their changes."""

    def __init__(self, netns_path: str) -> None:
        self._questions = in_namespace(netns_path, _open)
        self._questions.settimeout(ANSWER_TIMEOUT_S)
        self._changes = in_namespace(netns_path, lambda: _open(GROUPS))
        self._changes.setblocking(False)

    def close(self) -> None:
        """Close the sockets."""
        self._questions.close()
        self._changes.close()

    def fileno(self) -> int:
        """What to wait on for changes."""
        return self._changes.fileno()

    def look_up(self, addresses: Sequence[Address]) -> list[Hop | None]:
        """Return the next hop to each address; None: no route, or none of a plain kind."""
        hops: list[Hop | None] = []
        for start in range(0, len(addresses), MOST_QUESTIONS):
            some = addresses[start : start + MOST_QUESTIONS]
            self._questions.send(b"".join(_question(address, start) for address in some))
            answered = 0
            while answered < len(some):
                for kind, number, body in _messages(self._questions.recv(RECEIVE_BYTES)):
                    if number == start and kind in (RTM_NEWROUTE, NLMSG_ERROR):
                        hops.append(_hop(some[answered], kind, body))
                        answered += 1
        return hops

    def changed(self) -> list[Network] | None:
        """Return the destinations of routes that changed; None: it may be any of them."""
        found: list[Network] = []
        everything = False
        while True:
            try:
                data = self._changes.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return None if everything else found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                everything = True  # some were lost
                continue
            for kind, _, body in _messages(data):
                if kind in (RTM_NEWROUTE, RTM_DELROUTE):
                    found.append(_destination(body))
                else:
                    everything = True


def _open(groups: int = 0) -> socket.socket:
    handle = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    handle.bind((0, groups))
    return handle


def _question(address: Address, number: int) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    body += attribute(RTA_DST, address.packed)
    return NLMSG.pack(NLMSG.size + len(body), RTM_GETROUTE, NLM_F_REQUEST, number, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Split what was received: type, number and body of each message."""
    offset = 0
    while offset + NLMSG.size <= len(data):
        length, kind, _, number, _ = NLMSG.unpack_from(data, offset)
        yield kind, number, data[offset + NLMSG.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(body: bytes) -> dict[int, bytes]:
    found, offset = {}, _RTMSG.size
    while offset + NLA.size <= len(body):
        length, kind = NLA.unpack_from(body, offset)
        found[kind] = body[offset + NLA.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _hop(address: Address, kind: int, body: bytes) -> Hop | None:
    if kind == NLMSG_ERROR or _RTMSG.unpack_from(body)[7] != RTN_UNICAST:
        return None
    found = _attributes(body)
    if RTA_OIF not in found or RTA_VIA in found or RTA_MULTIPATH in found:
        return None
    # On a network of its own interface the UE itself is the neighbour.
    return Hop(_U32.unpack(found[RTA_OIF])[0], found.get(RTA_GATEWAY, address.packed))


def _destination(body: bytes) -> Network:
    family, length = body[0], body[1]
    if family == socket.AF_INET:
        return IPv4Network((_attributes(body).get(RTA_DST, bytes(4)), length), strict=False)
    return IPv6Network((_attributes(body).get(RTA_DST, bytes(16)), length), strict=False)
