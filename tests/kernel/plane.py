"""A user plane small enough for a test: two UEs, a UPF with the gate, two anchors, real packets."""

import functools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from controlplane.enforcement import Binding, Flow
from controlplane.five_qi import DSCPS, qos_flow
from upf import routing
from upf.buffering import PacketBuffer
from upf.config import AnchorPort, Attachment, GateConfig, PacketQueue, QosPoint
from upf.features import Features, probe
from upf.gate import Gate
from upf.netns import Namespace, connect
from upf.parking import ParkingLimits
from upf.qos import ROOT

UE = {4: ("10.45.0.1", "10.45.0.2"), 6: ("fd00:45::1", "fd00:45::2")}
SERVICE = {4: "198.18.0.1", 6: "fd00:a151::1"}
ANCHOR = {
    "a": {4: "10.47.1.2", 6: "fd00:47:1::2"},
    "b": {4: "10.47.2.2", 6: "fd00:47:2::2"},
}
PORT = 7
QUIET_S = 0.15  # long enough for a packet to have arrived, had it been let through
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
BEST_EFFORT = qos_flow(9, 0, 0, None, None)
LOW_LATENCY = qos_flow(80, 0, 0, None, None)
SHARED_CLASS = ROOT | 80


@functools.cache
def features() -> Features:
    return probe()


def packet_queue() -> PacketQueue | None:
    """Return how packets can wait on this kernel; None: they cannot."""
    return features().packet_queue()


class Plane:
    """Namespaces, links, routes, the gate, and UDP sockets on every host."""

    def __init__(
        self, *, in_place_renewal: bool = True, fast_path: bool = True, subscribed: bool = False
    ) -> None:
        """`subscribed`: UE 1 has a subscription to the service, and packets can wait."""
        self.in_place_renewal = in_place_renewal
        self.fast_path = fast_path and features().tc_bpf
        self.points: list[QosPoint] = []  # of gates opened from now on
        self.hosts = {name: Namespace() for name in ("ue1", "ue2", "upf", "a", "b")}
        self.config = GateConfig(
            n3_interfaces=("n3-1", "n3-2"),
            anchors=tuple(
                AnchorPort(
                    name=name,
                    interface=f"n6-{name}",
                    address4=ip_address(ANCHOR[name][4]),
                    address6=ip_address(ANCHOR[name][6]),
                )
                for name in ANCHOR
            ),
            attachments=tuple(
                Attachment(f"n3-{number}", ip_address(UE[version][number - 1]))
                for number in (1, 2)
                for version in (4, 6)
            ),
            dscps=tuple(sorted(set(DSCPS.values()))),
            queue=packet_queue() if subscribed else None,
            subscriptions=tuple(
                Flow(ip_address(UE[version][0]), ip_address(SERVICE[version]))
                for version in ((4, 6) if subscribed else ())
            ),
        )
        self._wire()
        upf = self.hosts["upf"].path
        routing.install(upf, self.config)
        self.gate = self.open_gate()
        self.buffer = self.open_buffer() if subscribed else None

    def open_gate(self, clock: Callable[[], int] = time.monotonic_ns) -> Gate:
        return Gate(
            self.hosts["upf"].path,
            self.config,
            in_place_renewal=self.in_place_renewal,
            fast_path=self.fast_path,
            clock=clock,
            points=self.points,
        )

    def open_buffer(self, limits: ParkingLimits | None = None) -> PacketBuffer:
        assert self.config.queue is not None
        return PacketBuffer(self.gate, self.hosts["upf"].path, self.config.queue.number, limits)

    def close(self) -> None:
        if self.buffer is not None:
            self.buffer.close()
        self.gate.close()
        for host in self.hosts.values():
            host.close()

    def _wire(self) -> None:
        upf = self.hosts["upf"]
        for host in self.hosts.values():  # addresses are usable at once
            for name in ("all/accept_dad", "default/accept_dad"):
                host.run(lambda path=name: _write(f"/proc/sys/net/ipv6/conf/{path}", "0"))
        for number in (1, 2):
            ue = self.hosts[f"ue{number}"]
            connect(
                upf,
                f"n3-{number}",
                ue,
                "radio",
                (f"10.46.{number}.1/24", f"10.46.{number}.2/24"),
                (f"fd00:46:{number}::1/64", f"fd00:46:{number}::2/64"),
            )
            for version, via in ((4, f"10.46.{number}."), (6, f"fd00:46:{number}::")):
                address = UE[version][number - 1]
                self._own(ue, address)
                self._route(ue, "default", f"{via}1", prefsrc=address)
                self._route(upf, f"{address}/{128 if version == 6 else 32}", f"{via}2")
        for number, name in enumerate(ANCHOR, start=1):
            anchor = self.hosts[name]
            connect(
                upf,
                f"n6-{name}",
                anchor,
                "n6",
                (f"10.47.{number}.1/24", f"10.47.{number}.2/24"),
                (f"fd00:47:{number}::1/64", f"fd00:47:{number}::2/64"),
            )
            for version, via in ((4, f"10.47.{number}.1"), (6, f"fd00:47:{number}::1")):
                self._own(anchor, SERVICE[version])
                self._route(anchor, "default", via)
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            upf.run(lambda path=name: _write(f"/proc/sys/net/{path}", "1"))
        for number, (ue, anchor) in enumerate((("ue1", "a"), ("ue2", "b")), start=1):
            for version, colon in ((4, "."), (6, "::")):
                stem = "10." if version == 4 else "fd00:"
                for network, neighbour in ((46, ue), (47, anchor)):
                    prefix = f"{stem}{network}{'.' if version == 4 else ':'}{number}{colon}"
                    self._wait_for_link(neighbour, version, f"{prefix}1")

    def _wait_for_link(self, host: str, version: int, upf_address: str) -> None:
        """Return once the UPF gets datagrams from a host: IPv6 takes a moment to come up."""
        with (
            self.open_socket("upf", version, upf_address) as receiver,
            self.open_socket(host, version) as sender,
        ):
            receiver.settimeout(0.01)
            until = time.monotonic() + 5
            while time.monotonic() < until:
                sender.sendto(b"?", (upf_address, PORT))
                if receives(receiver):
                    return
        raise AssertionError(f"{host} does not reach the UPF at {upf_address}")

    def route_both_ues_through_one_cell(self) -> None:
        """Send the downlink of both UEs into n3-1; UE 2's gets as far as UE 1, which drops it."""
        with self.hosts["upf"].links() as links:
            for version, via in ((4, "10.46.1.2"), (6, "fd00:46:1::2")):
                destination = f"{UE[version][1]}/{128 if version == 6 else 32}"
                links.route("replace", family=FAMILY[version], dst=destination, gateway=via)
        self.gate.follow_routes()

    @staticmethod
    def _own(host: Namespace, address: str) -> None:
        with host.links() as links:
            length = 128 if ":" in address else 32
            flags = {"flags": 0x02} if ":" in address else {}
            links.addr("add", index=1, address=address, prefixlen=length, **flags)

    @staticmethod
    def _route(host: Namespace, destination: str, gateway: str, **more: str) -> None:
        with host.links() as links:
            family = FAMILY[6 if ":" in gateway else 4]
            links.route("add", family=family, dst=destination, gateway=gateway, **more)

    # Traffic

    def open_socket(
        self, host: str, version: int, address: str = "", kind: int = socket.SOCK_DGRAM
    ) -> socket.socket:
        """Open a socket in a host, bound to an address and PORT if one is given."""

        def make() -> socket.socket:
            handle = socket.socket(FAMILY[version], kind)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            handle.bind((address, PORT if address else 0))
            handle.settimeout(QUIET_S)
            return handle

        return self.hosts[host].run(make)

    def listeners(self, version: int) -> dict[str, socket.socket]:
        return {name: self.open_socket(name, version, SERVICE[version]) for name in ANCHOR}

    def binding(
        self,
        lease_id: str,
        epoch: int,
        anchor: str,
        ttl_ms: int = 60_000,
        ue: int = 1,
        versions: tuple[int, ...] = (4, 6),
    ) -> Binding:
        return Binding(
            lease_id=lease_id,
            epoch=epoch,
            flows=tuple(
                Flow(ip_address(UE[version][ue - 1]), ip_address(SERVICE[version]))
                for version in versions
            ),
            anchor=anchor,
            qos=BEST_EFFORT,
            expires_ns=time.monotonic_ns() + ttl_ms * 1_000_000,
        )

    def reaches(self, version: int, ue: int = 1) -> str | None:
        """Return which anchor gets a datagram of a UE to the service, and None if none does."""
        listeners = self.listeners(version)
        with self.open_socket(f"ue{ue}", version, UE[version][ue - 1]) as sender:
            sender.sendto(b"x", (SERVICE[version], PORT))
            return heard(listeners)

    def answers(self, version: int, anchor: str, source: str = "", ue: int = 1) -> bool:
        """Return whether a datagram from an anchor (as the service) gets to a UE."""
        source = source or SERVICE[version]
        address = UE[version][ue - 1]
        with (
            self.open_socket(f"ue{ue}", version, address) as receiver,
            self.open_socket(anchor, version, source) as sender,
        ):
            sender.sendto(b"y", (address, PORT))
            return receives(receiver)

    def marked(self, version: int, ecn: int = 1) -> tuple[int, int] | None:
        """Return DSCP and ECN of a packet as UE 1 gets it from anchor a, sent with DSCP 4."""
        level, option, told = (
            (socket.IPPROTO_IP, socket.IP_TOS, 13)
            if version == 4
            else (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, socket.IPV6_RECVTCLASS)
        )
        with (
            self.open_socket("ue1", version, UE[version][0]) as receiver,
            self.open_socket("a", version, SERVICE[version]) as sender,
        ):
            sender.setsockopt(level, option, 4 << 2 | ecn)
            receiver.setsockopt(level, told, 1)
            sender.sendto(b"y", (UE[version][0], PORT))
            try:
                _, ancillary, _, _ = receiver.recvmsg(100, 64)
            except TimeoutError:
                return None
            tos = ancillary[0][2][0]
            return tos >> 2, tos & 3


def heard(listeners: dict[str, socket.socket]) -> str | None:
    """Return which of these sockets gets something; closes them."""
    names = [name for name, listener in listeners.items() if receives(listener)]
    for listener in listeners.values():
        listener.close()
    assert len(names) <= 1, "two anchors got the same packet"
    return names[0] if names else None


def receives(handle: socket.socket) -> bool:
    try:
        handle.recv(100)
    except TimeoutError:
        return False
    return True


def _write(path: str, value: str) -> None:
    Path(path).write_text(value)


@contextmanager
def plane(
    *, in_place_renewal: bool = True, fast_path: bool = True, subscribed: bool = False
) -> Iterator[Plane]:
    made = Plane(in_place_renewal=in_place_renewal, fast_path=fast_path, subscribed=subscribed)
    try:
        yield made
    finally:
        made.close()
