"""Hostile input at a real gate: nothing passes that no lease covers; a live session loses nothing.

The packets are in `hostile_cases`. They go out as whole frames, and are recognised by their payload
wherever they arrive.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from echoes import Echoes
from hostile_cases import CASES, Case, Craft, marked
from plane import ANCHOR, PORT, QUIET_S, SERVICE, UE, Plane, plane
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from controlplane.enforcement import Install
from upf import gate, routing

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
ETH_P_ALL, PACKET_OUTGOING = 3, 4
SO_RCVBUFFORCE, BUFFER_BYTES = 33, 64 << 20
DEVICE = {"ue1": "radio", "ue2": "radio", "a": "n6", "b": "n6"}
AT_UPF = {"ue1": "n3-1", "ue2": "n3-2", "a": "n6-a", "b": "n6-b"}
NEIGHBOUR = {"ue1": "ue2", "ue2": "ue1", "a": "b", "b": "a"}
OWN = {"ue1": UE[4][0], "ue2": UE[4][1], "a": ANCHOR["a"][4], "b": ANCHOR["b"][4]}
SENTINEL = b"sentinel"
OBEDIENT = {  # a router that does as packets tell it, tells all, and checks no sources itself
    "ipv4/icmp_ratelimit": "0",
    "ipv4/icmp_msgs_per_sec": "100000",
    "ipv4/icmp_msgs_burst": "100000",
    "ipv6/icmp/ratelimit": "0",
    "ipv4/conf/all/accept_source_route": "1",
    "ipv4/conf/all/rp_filter": "0",
    "ipv6/conf/all/seg6_enabled": "1",
}
FLOOD_PACKETS = 20_000
FULL_BYTES = 1_400  # too many for whoever believes a forged error about the MTU


class Arena:
    """The plane of the kernel tests, with a wire tap at every host and a listener at the UPF."""

    def __init__(self, net: Plane, stack: ExitStack) -> None:
        self.net = net
        upf = net.hosts["upf"]
        for name, value in OBEDIENT.items():
            upf.run(lambda name=name, value=value: _sysctl(name, value))
        for name in AT_UPF.values():
            upf.run(lambda name=name: _sysctl(f"ipv4/conf/{name}/rp_filter", "0"))
            upf.run(lambda name=name: _sysctl(f"ipv6/conf/{name}/seg6_enabled", "1"))
        for gateway in (ANCHOR["b"][4], ANCHOR["b"][6]):  # where what the gate forgets would go
            net._route(upf, "default", gateway)
        self._taps = {host: stack.enter_context(self._tap(host)) for host in DEVICE}
        self._ears: dict[str, list[socket.socket]] = {
            host: [tap] for host, tap in self._taps.items()
        }
        self._ears["upf"] = [
            stack.enter_context(net.open_socket("upf", version, address))
            for version, address in ((4, "0.0.0.0"), (6, "::"))
        ]
        for ear in (ear for ears in self._ears.values() for ear in ears):
            ear.setblocking(False)
        self._heard: dict[str, list[bytes]] = {host: [] for host in self._ears}
        self._macs = {
            host: {"src": self._mac(host, DEVICE[host]), "dst": self._mac("upf", AT_UPF[host])}
            for host in DEVICE
        }
        self._sentinels = 0

    def _tap(self, host: str) -> socket.socket:
        def make() -> socket.socket:
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            tap.bind((DEVICE[host], ETH_P_ALL))
            tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
            return tap

        return self.net.hosts[host].run(make)

    def _mac(self, host: str, device: str) -> str:
        with self.net.hosts[host].links() as links:
            (link,) = links.get_links(links.link_lookup(ifname=device)[0])
            return str(link.get_attr("IFLA_ADDRESS"))

    def frame(self, host: str, packet: Packet) -> bytes:
        """Return what goes from a host to the UPF, unless the packet is a frame and says more."""
        if not isinstance(packet, Ether):
            version = bytes(packet)[0] >> 4
            packet = Ether(type=0x86DD if version == 6 else 0x0800) / packet
        for name, address in self._macs[host].items():
            packet.fields.setdefault(name, address)
        return bytes(packet)

    def send(self, host: str, frames: list[bytes]) -> None:
        """Send frames, then one that every router passes, and wait until that is at its end.

        They take the same way through the kernel, in order.
        """
        self._sentinels += 1
        last = b"sentinel-%08d" % self._sentinels
        other = NEIGHBOUR[host]
        sentinel = IP(src=OWN[host], dst=OWN[other]) / UDP(sport=1, dport=9) / last
        frames = [*frames, self.frame(host, sentinel)]
        with on_one_cpu():
            for frame in frames:
                self._taps[host].send(frame)
        until = time.monotonic() + 2
        while not any(last in frame for frame in self._listen(other)):
            assert time.monotonic() < until, f"{host}'s sentinel does not reach {other}"

    def arrivals(self, number: int) -> set[str]:
        """Return who has got packets of a case by now."""
        mark = marked(number)
        for host in self._ears:
            self._listen(host)
        return {host for host, heard in self._heard.items() if any(mark in one for one in heard)}

    def _listen(self, host: str) -> list[bytes]:
        """Return what has come to a host since last time; keep what is hostile."""
        frames = []
        for ear in self._ears[host]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, origin = ear.recvfrom(65_536)
                    if ear.family != socket.AF_PACKET or origin[2] != PACKET_OUTGOING:
                        frames.append(frame)
        self._heard[host] += [frame for frame in frames if b"hostile-" in frame]
        return frames


@contextmanager
def arena(*, fast_path: bool = True) -> Iterator[Arena]:
    with plane(fast_path=fast_path) as net, ExitStack() as stack:
        yield Arena(net, stack)


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Keep this thread there, so that what it sends in order stays in order."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@contextmanager
def session(net: Plane) -> Iterator[dict[int, Echoes]]:
    """A live session of UE 1: full packets to the service and back, by IP version."""
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    with ExitStack() as stack:
        flows = {}
        for version in (4, 6):
            near = stack.enter_context(net.open_socket("ue1", version, UE[version][0]))
            far = stack.enter_context(net.open_socket("a", version, SERVICE[version]))
            flows[version] = Echoes(near, far, (SERVICE[version], PORT), FULL_BYTES)
        with flows[4], flows[6]:
            yield flows
        assert all(flow.sent > 100 for flow in flows.values())
        assert {version: flow.lost() for version, flow in flows.items()} == {4: 0, 6: 0}


def counters(net: Plane) -> dict[str, int]:
    """Return the gate's drops and the UPF's MIB: `Ip.InHdrErrors`, `Ip6.InHdrErrors`, ..."""

    def read() -> dict[str, int]:
        found = {}
        for name in ("snmp", "netstat"):
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
            for names, values in zip(lines[::2], lines[1::2], strict=True):
                group, *keys = names.split()
                pairs = zip(keys, map(int, values.split()[1:]), strict=True)
                found |= {f"{group[:-1]}.{key}": value for key, value in pairs}
        for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
            name, value = line.split()
            found[f"Ip6.{name.removeprefix('Ip6')}"] = int(value)
        return found

    return net.hosts["upf"].run(read)


def connections(net: Plane) -> int:
    path = Path("/proc/sys/net/netfilter/nf_conntrack_count")
    return net.hosts["upf"].run(lambda: int(path.read_text()))


def _sysctl(name: str, value: str) -> None:
    (Path("/proc/sys/net") / name).write_text(value)


def each_case() -> Iterator[tuple[int, int, Case]]:
    """Yield number, IP version and case."""
    number = 0
    for case in CASES:
        for version in case.versions:
            number += 1
            yield number, version, case


def attack(made: Arena, number: int, version: int, case: Case) -> tuple[int, set[str]]:
    """Send what a case says; return how many, and who but the sender got any of it."""
    frames = [made.frame(case.sender, one) for one in case.packets(Craft(version, number))]
    made.send(case.sender, frames)
    return len(frames), made.arrivals(number) - {case.sender}


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "gate alone"])
def test_nothing_passes_that_no_lease_covers(fast_path: bool) -> None:
    wrong = []
    with arena(fast_path=fast_path) as made, session(made.net):
        for number, version, case in each_case():
            drops, mib = made.net.gate.drops(), counters(made.net)
            packets, got = attack(made, number, version, case)
            rose = {
                reason: count - drops[reason]
                for reason, count in made.net.gate.drops().items()
                if count != drops[reason]
            }
            after = counters(made.net)
            wanted = case.rises(packets)
            rose |= {name: after[name] - mib[name] for name in wanted if "." in name}
            if got != case.covered(got) or rose != wanted:
                wrong.append(f"IPv{version}, {case.sender}: {case.name}: {got} got it; {rose}")
        time.sleep(QUIET_S)
        for number, version, case in each_case():  # what the kernel held back stays there
            if got := made.arrivals(number) - {case.sender, case.covered_by}:
                wrong.append(f"IPv{version}, {case.sender}: {case.name}: {got} got it in the end")
    assert not wrong, "\n".join(wrong)


def test_without_the_gate_they_pass() -> None:
    """The same packets and the same taps, at a router that steers by an ordinary route."""
    wrong = []
    with arena() as made:
        net = made.net
        upf = net.hosts["upf"].path
        gate.remove(upf)
        routing.remove(upf)
        for version in (4, 6):
            net._route(net.hosts["upf"], SERVICE[version], ANCHOR["a"][version])
        for number, version, case in each_case():
            _, got = attack(made, number, version, case)
            if (case.plain_router or None) not in (got or {None}):
                wrong.append(f"IPv{version}, {case.sender}: {case.name}: {got} got it")
    assert not wrong, "\n".join(wrong)


FLOODS = {
    "no_lease_uplink": lambda c: [c.udp(), c.tcp("S"), c.tcp("A"), c.echo()],
    "spoofed_source": lambda c: [c.udp(c.ue1), c.tcp("S", c.ue1), c.udp(c.stranger)],
    "direct_to_anchor": lambda c: [c.udp(dst=c.a), c.tcp("S", dst=c.b)],
}


def test_a_flood_without_a_lease_costs_a_live_session_nothing() -> None:
    with arena() as made, session(made.net):
        known = connections(made.net)
        for number, (reason, packets) in enumerate(FLOODS.items(), start=1):
            frames = [
                made.frame("ue2", packet)
                for version in (4, 6)
                for packet in packets(Craft(version, number))
            ]
            before = made.net.gate.drops()[reason]
            rounds = FLOOD_PACKETS // len(frames)
            made.send("ue2", frames * rounds)
            assert made.net.gate.drops()[reason] - before == rounds * len(frames)
            assert made.arrivals(number) == set()
        assert connections(made.net) - known < 10  # sentinels, and nothing for the flood
