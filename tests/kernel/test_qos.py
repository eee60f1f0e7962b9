"""QoS flows: what leases are promised under congestion, by real packets, and how it ends."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from plane import BEST_EFFORT, LOW_LATENCY, PORT, SERVICE, UE, Plane, plane

from controlplane.enforcement import Binding, EnforcementError, Install, Move, QosFlow, Revoke
from controlplane.five_qi import qos_flow
from upf import qos
from upf.config import QosPoint
from upf.lease_classes import LeaseClasses

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
CAPACITY_BPS = 24_000_000
GFBR_BPS, MFBR_BPS = 6_000_000, 8_000_000
VIDEO = qos_flow(4, GFBR_BPS, 0, MFBR_BPS, None)  # GBR
SHARED = {80: 68}
IP_BYTES = 1_500
PAYLOAD = {4: bytes(IP_BYTES - 28), 6: bytes(IP_BYTES - 48)}  # without UDP and IP headers
SECONDS = 1.2
VERSIONS = pytest.mark.parametrize("version", [4, 6])
MS = 1_000_000


@pytest.fixture
def net() -> Iterator[Plane]:
    # Past the IP stack a packet of this machine stays its socket's until it has left the queue: the
    # flood would wait for room instead of filling it (docs/decisions/0016).
    with plane(fast_path=False) as made:
        made.points = [
            QosPoint(netns=made.hosts["upf"].path, interface=name, capacity_bps=CAPACITY_BPS)
            for name in made.config.n3_interfaces
        ]
        qos.install(made.points, SHARED)
        made.gate.close()
        made.gate = made.open_gate()
        yield made


def lease(net: Plane, lease_id: str, flow: QosFlow, **more: int) -> Binding:
    return replace(net.binding(lease_id, 1, "a", **more), qos=flow)


def lease_classes(net: Plane, interface: str = "n3-1") -> dict[int, tuple[int, int]]:
    """Return rate and ceiling (bytes/s) of each lease's class on an interface, by class id."""
    with net.hosts["upf"].links() as links:
        return {
            found["handle"]: (parameters["rate"], parameters["ceil"])
            for found in links.get_classes(index=links.link_lookup(ifname=interface)[0])
            for parameters in [found.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_PARMS")]
            if qos.is_lease(found["handle"])
        }


def send_at(sender: socket.socket, address: str, rate_bps: float, seconds: float) -> None:
    """Send datagrams evenly, at this rate of IP packets."""
    payload = PAYLOAD[6 if ":" in address else 4]
    interval_s = IP_BYTES * 8 / rate_bps
    began = time.monotonic()
    for number in range(int(seconds / interval_s)):
        wait_s = began + number * interval_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        sender.sendto(payload, (address, PORT))


@contextmanager
def flood(net: Plane, version: int) -> Iterator[None]:
    """Fill n3-1 with what is sent to UE 2, at twice its capacity."""
    stop = threading.Event()

    def body() -> None:
        with net.open_socket("a", version, SERVICE[version]) as sender:
            while not stop.is_set():
                send_at(sender, UE[version][1], 2 * CAPACITY_BPS, 0.05)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        time.sleep(0.3)  # until the queues are full
        yield
    finally:
        stop.set()
        thread.join()


def received(net: Plane, version: int, rate_bps: float) -> list[int]:
    """Send to UE 1 at a rate for SECONDS; return when each packet came in, ns."""
    arrivals: list[int] = []
    with (
        net.open_socket("ue1", version, UE[version][0]) as receiver,
        net.open_socket("b", version, SERVICE[version]) as sender,
    ):
        receiver.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        receiver.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        receiver.settimeout(0.5)

        def receive() -> None:
            try:
                while True:
                    data, ancillary, _, _ = receiver.recvmsg(2_000, 64)
                    if len(data) == len(PAYLOAD[version]):
                        seconds, ns = (
                            int.from_bytes(ancillary[0][2][at : at + 8], "little") for at in (0, 8)
                        )
                        arrivals.append(seconds * 1_000_000_000 + ns)
            except TimeoutError:
                pass

        thread = threading.Thread(target=receive)
        thread.start()
        send_at(sender, UE[version][0], rate_bps, SECONDS)
        thread.join()
    return arrivals


def rate_of(arrivals: list[int]) -> float:
    """Return the rate of IP packets (bit/s) over the middle second."""
    first = arrivals[0] + 100 * MS
    return sum(first <= at < first + 1_000 * MS for at in arrivals) * IP_BYTES * 8


@VERSIONS
def test_gfbr_is_held_and_mfbr_not_exceeded(net: Plane, version: int) -> None:
    """UE 1 asks for twice its MFBR beside a flood; the flood's share is what is left."""
    net.route_both_ues_through_one_cell()
    video = replace(lease(net, "video", VIDEO), anchor="b")
    net.gate.apply([Install(video), Install(lease(net, "flood", BEST_EFFORT, ue=2))])
    assert set(lease_classes(net)) == set(lease_classes(net, "n3-2")) == {0xA15_1000}
    with flood(net, version):
        at_gfbr = received(net, version, GFBR_BPS)
        above = received(net, version, 2 * MFBR_BPS)
    assert len(at_gfbr) == int(SECONDS * GFBR_BPS / 8 / IP_BYTES)  # none lost
    assert GFBR_BPS * 0.98 <= rate_of(above) <= MFBR_BPS * 1.02


@pytest.mark.parametrize(
    ("version", "flow", "kept"),
    [(4, LOW_LATENCY, True), (6, LOW_LATENCY, True), (4, BEST_EFFORT, False)],
)
def test_a_leased_stream_beside_a_flood(
    net: Plane, version: int, flow: QosFlow, kept: bool
) -> None:
    """A shared class by 5QI goes before best effort, which is the negative control."""
    net.route_both_ues_through_one_cell()
    stream = replace(lease(net, "stream", flow), anchor="b")
    net.gate.apply([Install(stream), Install(lease(net, "flood", BEST_EFFORT, ue=2))])
    with flood(net, version):
        arrivals = received(net, version, 1_000_000)
    assert (len(arrivals) == int(SECONDS * 1_000_000 / 8 / IP_BYTES)) is kept


@VERSIONS
def test_packets_are_marked_while_the_lease_lasts(net: Plane, version: int) -> None:
    """The UE's kernel would drop a packet whose header's checksum was not kept right."""
    for flow, dscp in ((VIDEO, 34), (LOW_LATENCY, 18), (qos_flow(1, 1, 1, None, None), 46)):
        net.gate.apply([Install(one := lease(net, f"of {dscp}", flow))])
        assert net.marked(version) == (dscp, 1)
        assert net.marked(version, ecn=2) == (dscp, 2)
        net.gate.apply([Revoke(one)])
        assert net.marked(version) is None
    net.gate.apply([Install(lease(net, "plain", BEST_EFFORT))])
    assert net.marked(version) == (4, 1)


def test_a_lease_ends_in_the_kernel_and_a_new_process_finds_out(net: Plane) -> None:
    """Two leases; the process dies; one expires. Its class carries nobody's packets and goes."""
    short, long = lease(net, "short", VIDEO, ttl_ms=300), lease(net, "long", VIDEO, ue=2)
    net.gate.apply([Install(short), Install(long)])
    assert set(lease_classes(net)) == {0xA15_1000, 0xA15_1001}
    net.gate.close()
    while time.monotonic_ns() < short.expires_ns:
        time.sleep(0.01)
    assert net.marked(4) is None
    qos.install(net.points, SHARED)  # the tree is kept as it is, with its leases' classes
    assert set(lease_classes(net)) == {0xA15_1000, 0xA15_1001}
    net.gate = net.open_gate()
    assert set(lease_classes(net)) == {0xA15_1001}
    assert net.gate.reconcile([long]).adopted == ("long",)
    net.gate.apply([Install(again := lease(net, "again", VIDEO))])
    assert len(lease_classes(net)) == 2
    net.gate.apply([Revoke(long), Revoke(again)])
    assert lease_classes(net) == lease_classes(net, "n3-2") == {}


def test_the_journal_says_what_a_class_is(net: Plane) -> None:
    """After a restart with classes gone, or of other rates, they become what was granted."""
    net.gate.apply([Install(video := lease(net, "video", VIDEO))])
    as_granted = lease_classes(net)
    qos.remove(net.points)
    qos.install(net.points, SHARED)
    assert lease_classes(net) == {}
    net.gate.close()
    net.gate = net.open_gate()
    assert net.gate.reconcile([video]).adopted == ("video",)
    assert lease_classes(net) == lease_classes(net, "n3-2") == as_granted


def test_a_move_keeps_the_class_and_another_qos_gets_another(net: Plane) -> None:
    first = lease(net, "1", VIDEO)
    net.gate.apply([Install(first)])
    second = replace(first, lease_id="2", epoch=2, anchor="b")
    net.gate.apply([Move(second, first, time.monotonic_ns() + 100 * MS)])
    assert set(lease_classes(net)) == {0xA15_1000}
    third = replace(first, lease_id="3", epoch=3, qos=replace(VIDEO, max_downlink_bps=9_000_000))
    net.gate.apply([Move(third, second, time.monotonic_ns() + 100 * MS)])
    assert set(lease_classes(net)) == {0xA15_1001}
    net.gate.apply([Revoke(third)])
    assert lease_classes(net) == {}


def test_what_is_refused_leaves_no_class(net: Plane) -> None:
    net.gate.apply([Install(lease(net, "new", VIDEO))])
    stale = replace(lease(net, "stale", VIDEO), epoch=0)
    with pytest.raises(EnforcementError):
        net.gate.apply([Install(stale)])
    with net.hosts["upf"].links() as links:  # the second point is gone when the class is made
        links.link("del", index=links.link_lookup(ifname="n3-2")[0])
    with pytest.raises(EnforcementError, match="HTB"):
        net.gate.apply([Install(lease(net, "late", VIDEO, ue=2))])
    assert set(lease_classes(net)) == {0xA15_1000}


def test_an_interface_must_be_there(net: Plane) -> None:
    (point, *_) = net.points
    for make in (
        lambda one: qos.install([one], SHARED),
        lambda one: qos.extend([one], SHARED),
        lambda one: LeaseClasses([one], {}),
    ):
        with pytest.raises(qos.QosError, match="no interface absent"):
            make(replace(point, interface="absent"))
    with pytest.raises(qos.QosError, match="no network namespace /absent"):
        qos.install([replace(point, netns="/absent")], SHARED)
    with pytest.raises(qos.QosError, match="n6-a: no HTB tree"):
        qos.extend([replace(point, interface="n6-a")], SHARED)
