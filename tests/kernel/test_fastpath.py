"""The fast path forwards what a lease lets through, as a router does, and leaves all else be."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from plane import (
    FAMILY,
    LOW_LATENCY,
    PORT,
    SERVICE,
    SHARED_CLASS,
    UE,
    Plane,
    features,
    heard,
    plane,
    receives,
)
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Packet, Raw

from controlplane.enforcement import (
    EndDrain,
    EnforcementError,
    Install,
    Move,
    Renew,
    Revoke,
)
from upf import fastpath, ingress, qos
from upf.config import QosPoint
from upf.elements import Counters
from upf.flows import NO_LEASE, flow_key, next_state
from upf.gate import remove
from upf.libbpf import BpfError
from upf.nft_socket import BatchError

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
VERSIONS = pytest.mark.parametrize("version", [4, 6])
MS = 1_000_000


@pytest.fixture
def net() -> Iterator[Plane]:
    if not features().tc_bpf:
        pytest.skip(f"no forwarding at ingress: {features().reasons['tc_bpf']}")
    with plane() as made:
        yield made


def fast_packets(net: Plane, stem: str) -> int:
    """Return how many packets leases have on their entries in the fast path."""
    fast_path = net.gate._fast
    assert fast_path is not None
    entries = [entry for version in "46" for _, entry in fast_path.entries(stem + version)]
    return sum(entry.packets for entry in entries)


def datagram(version: int) -> Packet:
    network = IP if version == 4 else IPv6
    return network(src=UE[version][0], dst=SERVICE[version]) / UDP(sport=9, dport=PORT) / Raw(b"x")


def send(net: Plane, packet: Packet) -> None:
    """Send a packet of UE 1 as it is, through its neighbour."""
    from scapy.arch.linux import L3PacketSocket
    from scapy.arch.linux.rtnetlink import read_routes, read_routes6
    from scapy.config import conf

    def inside() -> None:
        conf.ifaces.reload()
        conf.route.routes, conf.route6.routes = read_routes(), read_routes6()
        conf.route.invalidate_cache()
        conf.route6.invalidate_cache()
        L3PacketSocket(iface="radio").send(packet)

    net.hosts["ue1"].run(inside)


@VERSIONS
def test_leased_datagrams_take_it_both_ways_and_are_counted_once(net: Plane, version: int) -> None:
    lease = net.binding("lease", 1, "a")
    net.gate.apply([Install(lease)])
    for _ in range(3):
        assert net.reaches(version) == "a"
        assert net.answers(version, "a")
    assert fast_packets(net, "up") == fast_packets(net, "down") == 3
    usage = net.gate.usage([lease])["lease"]
    assert (usage.uplink_packets, usage.downlink_packets) == (3, 3)
    assert sum(entry.usage.uplink_packets for entry in net.gate.enforced()) == 3
    assert sum(entry.usage.downlink_packets for entry in net.gate.enforced()) == 3
    net.gate.apply([Revoke(lease)])
    assert net.reaches(version) is None
    assert not net.answers(version, "a")


UNUSUAL = {
    "no datagram": lambda p: p.__class__(src=p.src, dst=p.dst) / Raw(b"nothing"),
    "time is up": lambda p: _with(p, ttl=1, hlim=1),
    "longer than its frame": lambda p: _with(p, len=200, plen=200),
    "options": lambda p: (
        _with(p, options=IPOption(b"\x07\x07\x04" + bytes(4)))
        if isinstance(p, IP)
        else p.__class__(src=p.src, dst=p.dst) / IPv6ExtHdrDestOpt() / p.payload
    ),
}


def _with(packet: Packet, **fields: object) -> Packet:
    for name, value in fields.items():
        if name in packet.default_fields:
            setattr(packet, name, value)
    return packet


@VERSIONS
@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_left_to_the_gate(net: Plane, version: int, case: str) -> None:
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    send(net, UNUSUAL[case](datagram(version)))
    time.sleep(0.1)
    assert fast_packets(net, "up") == 0


@VERSIONS
def test_a_tagged_frame_is_no_packet_for_this_router(net: Plane, version: int) -> None:
    from scapy.arch.linux import L2Socket
    from scapy.layers.l2 import Dot1Q, Ether

    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    with net.hosts["upf"].links() as links:
        index = links.link_lookup(ifname="n3-1")[0]
        mac = links.get_links(index)[0].get_attr("IFLA_ADDRESS")
    listeners = net.listeners(version)
    frames = [Ether(dst=mac) / Dot1Q(vlan=7), Ether(dst="02:00:00:00:00:99"), Ether(dst=mac)]
    for frame in frames:  # the last one is good: the control
        net.hosts["ue1"].run(lambda f=frame: L2Socket("radio").send(f / datagram(version)))
    assert heard(listeners) == "a"
    assert fast_packets(net, "up") == 1


@VERSIONS
def test_it_follows_the_route_to_a_ue(net: Plane, version: int) -> None:
    """A handover: the route to the UE is replaced; then taken away, which the gate takes over."""
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    assert net.answers(version, "a")
    ue, other = UE[version][0], {4: "10.46.2.2", 6: "fd00:46:2::2"}[version]
    net._own(net.hosts["ue2"], ue)  # the UE is now behind the other interface
    destination = f"{ue}/{128 if version == 6 else 32}"
    with net.hosts["upf"].links() as links:
        links.route("replace", family=FAMILY[version], dst=destination, gateway=other)
    net.gate.follow_routes()
    with (
        net.open_socket("ue2", version, ue) as receiver,
        net.open_socket("a", version, SERVICE[version]) as sender,
    ):
        sender.sendto(b"y", (ue, PORT))
        assert receives(receiver)
        assert fast_packets(net, "down") == 2
        with net.hosts["upf"].links() as links:
            links.route("del", family=FAMILY[version], dst=destination, gateway=other)
        net.gate.follow_routes()
        sender.sendto(b"y", (ue, PORT))
        assert not receives(receiver)
    assert fast_packets(net, "down") == 2


@VERSIONS
def test_its_packets_are_in_their_leases_class(net: Plane, version: int) -> None:
    """Past the gate, which would write the same DSCP."""
    point = QosPoint(netns=net.hosts["upf"].path, interface="n3-1", capacity_bps=1_000_000_000)
    qos.install([point], {80: 68})
    net.gate.apply([Install(lease := replace(net.binding("lease", 1, "a"), qos=LOW_LATENCY))])
    assert net.marked(version) == (18, 1)
    assert fast_packets(net, "down") == 1
    assert net.gate.usage([lease])["lease"].downlink_packets == 1
    with net.hosts["upf"].links() as links:
        index = links.link_lookup(ifname="n3-1")[0]
        (found,) = [
            each for each in links.get_classes(index=index) if each["handle"] == SHARED_CLASS
        ]
    assert found.get_attr("TCA_STATS2").get_attr("TCA_STATS_BASIC")["packets"] == 1


@VERSIONS
def test_the_old_anchor_answers_through_it_until_the_drain_ends(net: Plane, version: int) -> None:
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    net.gate.apply([Install(old)])
    net.gate.apply([Move(new, old, time.monotonic_ns() + 5_000 * MS)])
    assert net.reaches(version) == "b"
    assert net.answers(version, "a") and net.answers(version, "b")
    assert fast_packets(net, "down") == 2
    net.gate.apply([EndDrain(old)])
    assert not net.answers(version, "a")


def test_a_new_process_adopts_it_and_removal_takes_it_away(net: Plane) -> None:
    lease = net.binding("lease", 1, "a")
    net.gate.apply([Install(lease)])
    assert net.reaches(4) == "a" and net.answers(4, "a")
    net.gate.close()
    net.gate = net.open_gate()
    assert net.gate.reconcile([lease]).adopted == ("lease",)
    assert net.reaches(4) == "a" and net.answers(4, "a")
    assert fast_packets(net, "up") == fast_packets(net, "down") == 2
    upf = net.hosts["upf"]
    indices = fastpath.ports(upf.path, net.config).index.values()
    for there in (set(indices), set()):
        with ingress.attached(upf.path, indices) as found:
            assert {index for index, _ in found} == there
        remove(upf.path)
    assert upf.run(lambda: command("nft list tables; tc qdisc show | grep -v noqueue")) == ""


def command(line: str) -> str:
    return subprocess.run(line, shell=True, capture_output=True, text=True).stdout


def test_filters_of_others_stay_as_they_are(net: Plane) -> None:
    upf = net.hosts["upf"]
    match = "protocol all u32 match u32 0 0 flowid 1:1"
    upf.run(lambda: command("tc qdisc add dev n3-1 clsact"))
    upf.run(lambda: command(f"tc filter add dev n3-1 ingress {match}"))
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    assert net.reaches(4) == "a"
    assert fast_packets(net, "up") == 1
    remove(upf.path)
    assert "u32" in upf.run(lambda: command("tc filter show dev n3-1 ingress"))


@VERSIONS
def test_an_entry_lets_nothing_through_past_its_deadline(net: Plane, version: int) -> None:
    """With the gate out of the way: it knows no lease, the entries are put beside it."""
    fast_path, lease = net.gate._fast, net.binding("lease", 1, "a")
    assert fast_path is not None
    key = flow_key(lease.flows[version == 6])
    state = next_state(Install(lease), NO_LEASE, 0)
    entries = net.gate._elements.fast(key, state)
    for passes, until_ns in (
        (True, time.monotonic_ns() + 60_000 * MS),
        (False, time.monotonic_ns()),
    ):
        for name, place, data, comment, _, _ in entries:
            fast_path.put((name, place, data, comment, until_ns, None), Counters(0, 0))
        assert (net.reaches(version) == "a") is passes
        assert net.answers(version, "a") is passes
        assert fast_packets(net, "up") == fast_packets(net, "down") == passes


def test_a_renewal_counts_on_and_a_refused_batch_changes_nothing(
    net: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = net.binding("lease", 1, "a")
    net.gate.apply([Install(lease)])
    assert net.reaches(4) == "a" and net.answers(4, "a")
    net.gate.apply([Renew(longer := replace(lease, expires_ns=lease.expires_ns + 60_000 * MS))])
    assert net.reaches(4) == "a" and net.answers(4, "a")
    assert fast_packets(net, "up") == fast_packets(net, "down") == 2

    def refuse(*_: object) -> None:
        raise BatchError(28, "the batch")

    with monkeypatch.context() as patch:
        patch.setattr(net.gate._timed, "change", refuse)
        with pytest.raises(EnforcementError):
            net.gate.apply([Revoke(longer)])
    assert net.reaches(4) == "a" and net.answers(4, "a")
    assert fast_packets(net, "up") == fast_packets(net, "down") == 3


def test_a_new_process_has_the_entries_of_its_leases_and_no_others(net: Plane) -> None:
    fast_path, lease = net.gate._fast, net.binding("lease", 1, "a")
    assert fast_path is not None
    net.gate.apply([Install(lease)])
    stale = net.binding("gone", 1, "b", ue=2)
    for flow in stale.flows:
        state = next_state(Install(stale), NO_LEASE, 0)
        for wanted in net.gate._elements.fast(flow_key(flow), state):
            fast_path.put(wanted, Counters(0, 0))
    assert len(list(fast_path.entries("up4"))) == 2
    fast_path._maps["up6"].take(flow_key(lease.flows[1]) + bytes(4))  # as a hold would
    net.gate.close()
    net.gate = net.open_gate()
    assert net.gate._fast is not None
    for name in ("up4", "up6", "down4", "down6"):
        assert len(list(net.gate._fast.entries(name))) == 1, name


def test_where_there_is_no_room_the_gate_alone_carries_a_lease(
    net: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_path, lease = net.gate._fast, net.binding("lease", 1, "a")
    assert fast_path is not None

    def full(*_: object) -> None:
        raise BpfError(7, "full")

    monkeypatch.setattr(fast_path._maps["up4"], "put", full)
    net.gate.apply([Install(lease)])
    assert net.reaches(4) == "a" and net.answers(4, "a")
    assert (fast_packets(net, "up"), fast_packets(net, "down")) == (0, 1)
    assert net.gate.usage([lease])["lease"].uplink_packets == 1
