"""Leases of QoS alone: the UE's server is its own business, a lease gives its packets a class."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from plane import BEST_EFFORT, FAMILY, LOW_LATENCY, PORT, SHARED_CLASS, UE, Plane, plane, receives

from controlplane.enforcement import (
    Binding,
    EnforcementError,
    Flow,
    Install,
    Move,
    QosFlow,
    Renew,
    Revoke,
    StaleEpochError,
    Usage,
)
from upf.config import QosPoint
from upf.netns import Namespace, connect
from upf.nft_socket import NftSocket
from upf.qos import install
from upf.readback import read_elements

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
VERSIONS = pytest.mark.parametrize("version", [4, 6])
SERVER = {4: "10.48.0.2", 6: "fd00:48::2"}
MS = 1_000_000


@pytest.fixture
def net() -> Iterator[Plane]:
    with plane() as made:
        with_server(made)
        yield made


@pytest.fixture(params=[True, False], ids=["renews in place", "deletes and adds"])
def any_kernel(request: pytest.FixtureRequest) -> Iterator[Plane]:
    with plane(in_place_renewal=request.param) as made:
        with_server(made)
        yield made


def with_server(net: Plane) -> None:
    """Attach a server to a network of its own beyond the UPF, and HTB classes to N3."""
    server = net.hosts["server"] = Namespace()
    server.run(lambda: Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0"))
    cidrs = (("10.48.0.1/24", f"{SERVER[4]}/24"), ("fd00:48::1/64", f"{SERVER[6]}/64"))
    connect(net.hosts["upf"], "n6-dn", server, "dn", *cidrs)
    with server.links() as links:
        for version, gateway in ((4, "10.48.0.1"), (6, "fd00:48::1")):
            links.route("add", family=FAMILY[version], dst="default", gateway=gateway)
    point = QosPoint(netns=net.hosts["upf"].path, interface="n3-1", capacity_bps=1_000_000_000)
    install([point], {80: 68})
    for version in (4, 6):  # until both ways are up
        until = time.monotonic() + 5
        while not asks_and_is_answered(net, version):
            assert time.monotonic() < until


def qos_alone(
    net: Plane, lease_id: str, epoch: int = 1, ttl_ms: int = 60_000, qos: QosFlow = LOW_LATENCY
) -> Binding:
    flows = tuple(Flow(ip_address(UE[v][0]), ip_address(SERVER[v])) for v in (4, 6))
    anchored = net.binding(lease_id, epoch, "a", ttl_ms)
    return replace(anchored, anchor=None, flows=flows, qos=qos)


def asks_and_is_answered(net: Plane, version: int) -> bool:
    with (
        net.open_socket("server", version, SERVER[version]) as server,
        net.open_socket("ue1", version, UE[version][0]) as ue,
    ):
        ue.sendto(b"x", (SERVER[version], PORT))
        if not receives(server):
            return False
        server.sendto(b"y", (UE[version][0], PORT))
        return receives(ue)


def class_packets(net: Plane) -> int:
    """Return how many packets have been in the class of its 5QI."""
    with net.hosts["upf"].links() as links:
        for found in links.get_classes(index=links.link_lookup(ifname="n3-1")[0]):
            if found["handle"] == SHARED_CLASS:
                return int(found.get_attr("TCA_STATS2").get_attr("TCA_STATS_BASIC")["packets"])
    raise AssertionError("no such class")


@VERSIONS
def test_a_lease_gives_a_class_and_the_path_is_always_open(net: Plane, version: int) -> None:
    lease = qos_alone(net, "lease")
    assert asks_and_is_answered(net, version)
    before = class_packets(net)
    net.gate.apply([Install(lease)])
    assert asks_and_is_answered(net, version)
    assert class_packets(net) == before + 1
    octets = 29 if version == 4 else 49  # one byte, UDP, IP
    assert net.gate.usage([lease]) == {
        "lease": Usage(uplink_packets=0, uplink_bytes=0, downlink_packets=1, downlink_bytes=octets)
    }
    net.gate.apply([Revoke(lease)])
    assert asks_and_is_answered(net, version)
    assert class_packets(net) == before + 1
    assert net.gate.usage([lease]) == {}
    assert net.gate.enforced() == []
    assert set(net.gate.drops().values()) == {0}


@VERSIONS
def test_it_ends_at_its_deadline(net: Plane, version: int) -> None:
    ttl_ms = 400
    before = class_packets(net)
    with (
        net.open_socket("ue1", version, UE[version][0]) as ue,
        net.open_socket("server", version, SERVER[version]) as server,
    ):
        lease = qos_alone(net, "lease", ttl_ms=ttl_ms)
        net.gate.apply([Install(lease)])
        last_ns = sent = counted = 0
        while (now := time.monotonic_ns()) < lease.expires_ns + 100 * MS:
            server.sendto(b"y", (UE[version][0], PORT))
            sent += 1
            assert receives(ue)
            if (found := class_packets(net) - before) != counted:
                counted, last_ns = found, now
    assert lease.expires_ns - 50 * MS < last_ns < lease.expires_ns
    assert 0 < counted < sent


def test_without_a_class_there_is_still_a_lease(net: Plane) -> None:
    lease = qos_alone(net, "lease", qos=BEST_EFFORT)
    before = class_packets(net)
    net.gate.apply([Install(lease)])
    assert asks_and_is_answered(net, 4)
    assert class_packets(net) == before
    assert [(entry.lease_id, entry.anchor) for entry in net.gate.enforced()] == [
        ("lease", None),
        ("lease", None),
    ]
    assert net.gate.usage([lease])["lease"].downlink_packets == 1


def test_renewal_moves_the_deadline_and_keeps_the_counters(any_kernel: Plane) -> None:
    net = any_kernel
    net.gate.apply([Install(qos_alone(net, "lease", ttl_ms=500))])
    assert asks_and_is_answered(net, 4)
    longer = qos_alone(net, "lease")
    net.gate.apply([Renew(longer)])
    time.sleep(0.6)
    assert asks_and_is_answered(net, 4)
    assert net.gate.usage([longer])["lease"].downlink_packets == 2


def test_a_move_needs_anchors(net: Plane) -> None:
    lease, anchored = qos_alone(net, "1"), replace(qos_alone(net, "2", epoch=2), anchor="a")
    net.gate.apply([Install(lease)])
    with pytest.raises(EnforcementError, match="without anchors"):
        net.gate.apply([Move(anchored, lease, time.monotonic_ns() + MS)])
    assert {entry.lease_id for entry in net.gate.enforced()} == {"1"}


def test_a_restart_adopts_fences_and_removes(any_kernel: Plane) -> None:
    net = any_kernel
    known, stranger = qos_alone(net, "known", epoch=3), net.binding("stranger", 1, "a")
    net.gate.apply([Install(known), Install(stranger)])
    assert asks_and_is_answered(net, 4)
    net.gate.close()
    net.gate = net.open_gate()
    with pytest.raises(StaleEpochError):
        net.gate.apply([Install(qos_alone(net, "older", epoch=2))])
    outcome = net.gate.reconcile([known])
    assert (outcome.adopted, outcome.installed, outcome.removed) == (("known",), (), ("stranger",))
    assert net.gate.usage([known, stranger])["known"].downlink_packets == 1  # undisturbed
    assert held(net) == {"qos4": {b"known 3"}, "qos6": {b"known 3"}}  # nothing of the stranger's
    assert net.gate.reconcile([]).removed == ("known",)
    assert held(net) == {}
    before = class_packets(net)
    assert asks_and_is_answered(net, 4)
    assert class_packets(net) == before


def test_an_anchor_and_qos_alone_side_by_side(net: Plane) -> None:
    """One UE, two servers: each lease ends on its own."""
    alone = qos_alone(net, "alone")
    anchored = replace(net.binding("anchored", 1, "a"), qos=LOW_LATENCY)
    net.gate.apply([Install(alone), Install(anchored)])
    assert net.reaches(4) == "a"
    before = class_packets(net)
    assert net.answers(4, "a")
    assert class_packets(net) == before + 1
    anchors = {entry.lease_id: entry.anchor for entry in net.gate.enforced()}
    assert anchors == {"alone": None, "anchored": "a"}
    net.gate.apply([Revoke(anchored)])
    assert asks_and_is_answered(net, 4)
    assert class_packets(net) == before + 2
    assert net.reaches(4) is None


def held(net: Plane) -> dict[str, set[bytes]]:
    """Return whose elements the kernel holds, by set."""
    names = [f"{stem}{version}" for stem in ("steer", "return", "qos", "drain") for version in "46"]
    socket = NftSocket(net.hosts["upf"].path, in_place_renewal=True)
    try:
        found = {name: {each.comment for each in read_elements(socket, name)} for name in names}
    finally:
        socket.close()
    return {name: comments for name, comments in found.items() if comments}
