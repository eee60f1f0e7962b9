"""What the gate reads back: counters of each lease's own elements, and the decoder it reads by."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from plane import LOW_LATENCY, PORT, SERVICE, UE, Plane, plane

from controlplane.enforcement import Binding, Flow, Install, Move, Revoke, Usage
from upf.answers import ElementDecoder
from upf.nft_socket import MAX_QUERIES, NftSocket
from upf.readback import decode_with_pyroute2

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
MINUTE_NS = 60_000_000_000
OCTETS = {4: 29, 6: 49}  # one byte, UDP, IP


@pytest.fixture
def net() -> Iterator[Plane]:
    with plane() as made:
        yield made


def many(net: Plane, count: int, ttl_ms: int = 60_000) -> list[Binding]:
    """Return dual-stack leases of UEs that are not there."""
    return [
        replace(
            net.binding(f"lease-{number}", 1, "a", ttl_ms),
            flows=(
                Flow(IPv4Address("10.45.1.0") + number, ip_address(SERVICE[4])),
                Flow(IPv6Address("fd00:45::1:0") + number, ip_address(SERVICE[6])),
            ),
        )
        for number in range(count)
    ]


class Traffic:
    """Sockets that stay open, so that no host answers a datagram with an ICMP error."""

    def __init__(self, net: Plane, undo: ExitStack) -> None:
        hosts = {"ue1": {v: UE[v][0] for v in (4, 6)}, "a": SERVICE, "b": SERVICE}
        self._sockets = {
            (host, version): undo.enter_context(net.open_socket(host, version, addresses[version]))
            for host, addresses in hosts.items()
            for version in (4, 6)
        }

    def up(self, version: int, count: int) -> None:
        for _ in range(count):
            self._sockets["ue1", version].sendto(b"x", (SERVICE[version], PORT))

    def down(self, version: int, anchor: str, count: int) -> None:
        for _ in range(count):
            self._sockets[anchor, version].sendto(b"y", (UE[version][0], PORT))


@pytest.fixture
def traffic(net: Plane) -> Iterator[Traffic]:
    with ExitStack() as undo:
        yield Traffic(net, undo)


def counted(uplink: dict[int, int], downlink: dict[int, int]) -> Usage:
    """Return the usage that so many packets by IP version make."""
    return Usage(
        uplink_packets=sum(uplink.values()),
        uplink_bytes=sum(OCTETS[version] * count for version, count in uplink.items()),
        downlink_packets=sum(downlink.values()),
        downlink_bytes=sum(OCTETS[version] * count for version, count in downlink.items()),
    )


def test_both_directions_and_families_are_summed(net: Plane, traffic: Traffic) -> None:
    lease, other = net.binding("lease", 1, "a"), net.binding("other", 1, "b", ue=2)
    net.gate.apply([Install(lease), Install(other)])
    for version, up, down in ((4, 2, 3), (6, 5, 7)):
        traffic.up(version, up)
        traffic.down(version, "a", down)
    gone = replace(other, lease_id="gone")
    assert net.gate.usage([lease, gone, other]) == {
        "lease": counted({4: 2, 6: 5}, {4: 3, 6: 7}),
        "other": counted({}, {}),
    }


def test_a_later_lease_is_not_counted_for_an_earlier_one(net: Plane, traffic: Traffic) -> None:
    first, second = net.binding("1", 1, "a"), net.binding("2", 2, "b")
    third = net.binding("3", 3, "a")
    drain_ns = time.monotonic_ns() + MINUTE_NS
    net.gate.apply([Install(first)])
    traffic.up(4, 1)
    traffic.down(4, "a", 2)
    net.gate.apply([Move(second, first, drain_ns)])
    traffic.up(4, 4)
    traffic.down(4, "a", 8)  # the source may finish
    assert net.gate.usage([first, second]) == {
        "1": counted({}, {4: 10}),
        "2": counted({4: 4}, {}),
    }
    net.gate.apply([Move(third, second, drain_ns)])
    traffic.down(4, "a", 1)
    assert net.gate.usage([first, second, third]) == {
        "2": counted({}, {}),
        "3": counted({}, {4: 1}),
    }


def test_many_are_read_whatever_is_missing_between_them(net: Plane) -> None:
    leases = many(net, MAX_QUERIES)  # four elements each: several sends
    there = [lease for number, lease in enumerate(leases) if number % 3]
    net.gate.apply([Install(lease) for lease in there])
    assert net.gate.usage(leases) == {lease.lease_id: counted({}, {}) for lease in there}
    assert net.gate.usage([]) == {}


def test_a_mass_release_closes_everything_though_some_expired_unnoticed(net: Plane) -> None:
    """The kernel ends elements up to some milliseconds early; those of one set share a request."""
    frozen = time.monotonic_ns()
    gate = net.open_gate(clock=lambda: frozen)
    leases = many(net, 20)
    leases[7] = replace(leases[7], expires_ns=frozen + 30_000_000)
    gate.apply([Install(lease) for lease in leases])
    until = time.monotonic() + 5
    while len(gate.usage(leases)) == len(leases):
        assert time.monotonic() < until
    gate.apply([Revoke(lease) for lease in leases])
    assert gate.enforced() == []


def test_decoding_equals_pyroute2_in_every_set(net: Plane) -> None:
    """And knows every shape there is, for else it would be slow."""
    old, new = net.binding("old", 1, "a"), net.binding("new", 22, "b")
    old, new = (replace(lease, qos=LOW_LATENCY) for lease in (old, new))
    alone, *others = (replace(lease, qos=LOW_LATENCY) for lease in many(net, 300))
    alone = replace(alone, anchor=None)
    net.gate.apply([Install(old), *map(Install, others)])
    net.gate.apply([Move(new, old, time.monotonic_ns() + MINUTE_NS), Install(alone)])
    net.reaches(4)
    socket = NftSocket(net.hosts["upf"].path, in_place_renewal=True)
    try:
        for stem, least in (("steer", 300), ("return", 301), ("qos", 301), ("drain", 1)):
            for version in (4, 6):
                decoder = ElementDecoder(f"{stem}{version}")
                count = 0
                for message in socket.dump_elements(f"{stem}{version}"):
                    elements = decoder.decode(message)
                    assert elements == decode_with_pyroute2(message)
                    count += len(elements)
                assert count == least
    finally:
        socket.close()
