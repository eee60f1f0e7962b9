"""The network in which one method moves a service: UE, router, and two anchors that serve it."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network

from scripts.bench.chain import N3, N3_LINK, RADIO, forward, make_local, n6, n6_link, route
from scripts.errors import UserError
from upf.netns import Namespace, connect

UE, SERVICE = IPv4Address("10.45.0.1"), IPv4Address("198.18.0.1")
HTTP_PORT = 8080
UE_NET, SERVICE_NET = ip_network(f"{UE}/32"), ip_network(f"{SERVICE}/32")
COMMAND_TIMEOUT_S = 20
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17


@dataclass(frozen=True, slots=True)
class Switched:
    """When a command to switch was begun, and when it said that it was done (CLOCK_REALTIME)."""

    begin_ns: int
    end_ns: int


class Network:
    """Namespaces `ue`, `router` and two anchors; both anchors own the service address.

    The router forwards, and has no route to the service address: that is up to the method.
    """

    def __init__(self, undo: ExitStack, *, forwards: bool = True) -> None:
        """Build it; it vanishes with `undo`."""
        self.ue, self.router, first, second = (
            undo.enter_context(Namespace()) for _ in ("ue", "router", "anchor", "anchor")
        )
        self.anchors = (first, second)
        if forwards:
            self.router.run(forward)
        connect(self.ue, RADIO, self.router, N3, *N3_LINK)
        make_local(self.ue, [UE_NET])
        route(self.router, UE_NET, N3_LINK[0][0])
        self.route_from_ue(str(SERVICE))
        for number, anchor in enumerate(self.anchors):
            connect(self.router, n6(number), anchor, n6(number), *n6_link(number))
            make_local(anchor, [SERVICE_NET])
            route(anchor, ip_network("0.0.0.0/0"), n6_link(number)[0][0])
            compute_checksums(anchor, n6(number))
        compute_checksums(self.ue, RADIO)

    def route_from_ue(self, address: str) -> None:
        """Let the UE reach an address through the router, from its own."""
        gateway = N3_LINK[0][1].split("/")[0]
        with self.ue.links() as links:
            links.route("add", dst=f"{address}/32", gateway=gateway, prefsrc=str(UE))

    @staticmethod
    def gateway(number: int) -> str:
        """Return an anchor's own address, which is the way to it from the router."""
        return n6_link(number)[0][1].split("/")[0]


def compute_checksums(namespace: Namespace, interface: str) -> None:
    """Have a veth's sender compute checksums (ethtool -K INTERFACE tx off).

    A switch in user space gets packets as they are sent: what a network card would have filled in
    is missing then.
    """
    value = struct.pack("II", ETHTOOL_STXCSUM, 0)
    buffer = ctypes.create_string_buffer(value, len(value))
    request = struct.pack("16sQ16x", interface.encode(), ctypes.addressof(buffer))

    def switch_off() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCETHTOOL, request)

    namespace.run(switch_off)


def command(namespace: Namespace, argv: Sequence[str], text: str = "") -> Switched:
    """Run a command in a namespace, with `text` as its input; UserError if it fails.

    Its time is from just before the process is started until it has ended.
    """

    def run() -> Switched:
        begin_ns = time.time_ns()
        done = subprocess.run(
            argv, input=text.encode(), capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        end_ns = time.time_ns()
        if done.returncode != 0:
            words = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise UserError(f"{argv[0]} failed: {words}")
        return Switched(begin_ns, end_ns)

    return namespace.run(run)
