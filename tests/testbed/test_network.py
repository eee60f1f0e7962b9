import os
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from testbed_helpers import in_isolation, udp

from controlplane.configfile import parse_yaml
from topologies.errors import TopologyError
from topologies.network import Network
from topologies.spec import TopologySpec
from upf.netns import in_namespace

pytestmark = pytest.mark.testbed

SMALL = """\
name: small
ues: {count: 2}
gnbs:
  - {name: gnb1, downlink_mbps: 40, uplink_mbps: 20}
  - {name: gnb2, downlink_mbps: 1000, uplink_mbps: 1000}
anchors:
  - {name: edge1}
  - {name: edge2, rate_mbps: 100}
"""


def small() -> TopologySpec:
    return parse_yaml(SMALL, TopologySpec, "small")


def round_trip(left: socket.socket, right: socket.socket) -> None:
    left.sendto(b"there", right.getsockname()[:2])
    data, sender = right.recvfrom(64)
    assert (data, sender[0]) == (b"there", left.getsockname()[0])
    right.sendto(b"back", sender)
    data, sender = left.recvfrom(64)
    assert (data, sender[0]) == (b"back", right.getsockname()[0])


def reaches(left: socket.socket, right: socket.socket) -> bool:
    right.settimeout(0.3)
    left.sendto(b"anyone?", right.getsockname()[:2])
    try:
        right.recvfrom(64)
    except TimeoutError:
        return False
    return True


def test_everyone_reaches_whom_it_should_in_both_families() -> None:
    def body() -> None:
        with Network(small()) as network:
            core, edge = network.core, network.anchors["edge1"]
            for version in ("address4", "address6"):
                at_core = udp(core, getattr(core, version))
                at_edge = udp(edge, getattr(edge, version))
                round_trip(at_core, at_edge)
                for ue in network.ues:
                    round_trip(udp(ue, getattr(ue, version)), at_core)
                    round_trip(udp(ue, getattr(ue, version)), at_edge)
            network.check_alive()

    in_isolation(body)


def test_service_addresses_have_no_route_until_someone_steers() -> None:
    def body() -> None:
        with Network(small()) as network:
            service = IPv4Address("198.18.0.1"), IPv6Address("fd00:a151::1")
            network.add_service("edge1", *service)
            network.verify()
            ue, edge = network.ues[0], network.anchors["edge1"]
            assert not reaches(udp(ue, ue.address4), udp(edge, service[0]))
            assert not reaches(udp(ue, ue.address6), udp(edge, service[1]))

    in_isolation(body)


def test_handover_keeps_the_address_and_loses_nothing() -> None:
    def body() -> None:
        with Network(small()) as network:
            ue, core = network.ues[0], network.core
            for ue_address, core_address in (
                (ue.address4, core.address4),
                (ue.address6, core.address6),
            ):
                at_ue, at_core = udp(ue, ue_address), udp(core, core_address)
                for number in range(40):
                    network.handover("ue1", ("gnb2", "gnb1")[number % 2])
                    for _ in range(5):
                        round_trip(at_ue, at_core)
            assert ue.serving_gnb == "gnb1"
            network.verify()
            with pytest.raises(TopologyError, match="no gNB gnb9"):
                network.handover("ue1", "gnb9")

    in_isolation(body)


def goodput_mbps(source: socket.socket, sink: socket.socket, offered_mbps: float) -> float:
    """What of an offered rate arrives, over half a second."""
    payload, to = bytes(1400), sink.getsockname()[:2]
    sink.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
    sent, start = 0, time.monotonic()
    while (elapsed := time.monotonic() - start) < 0.5:
        while sent < elapsed * offered_mbps * 1e6 / 8 / len(payload):
            source.sendto(payload, to)
            sent += 1
        time.sleep(0.001)
    sink.settimeout(0)
    received = 0
    try:
        while sink.recv(2000):
            received += 1
    except BlockingIOError:
        pass
    return received * 1428 * 8 / (time.monotonic() - start) / 1e6


def test_a_cell_carries_its_capacity_and_no_more() -> None:
    def body() -> None:
        with Network(small()) as network:
            ue, core = network.ues[0], network.core
            at_ue, at_core = udp(ue, ue.address4), udp(core, core.address4)
            assert 32 < goodput_mbps(at_core, at_ue, 120) < 44
            assert 16 < goodput_mbps(at_ue, at_core, 60) < 22

    in_isolation(body)


def drop_route(network: Network) -> None:
    network._nodes["upf"].stack.rtnl.route("del", dst="10.45.0.1/32")


def drop_qdisc(network: Network) -> None:
    stack = network._nodes["gnb1"].stack
    stack.rtnl.tc("del", "htb", index=stack.index("cell"), handle=0xA15_0000)


def stop_forwarding(network: Network) -> None:
    knob = Path("/proc/sys/net/ipv4/ip_forward")
    in_namespace(network.upf.netns, lambda: knob.write_text("0"))


def take_down(network: Network) -> None:
    stack = network._nodes["ue1"].stack
    stack.rtnl.link("set", index=stack.index("radio-gnb2"), state="down")


def drop_address(network: Network) -> None:
    stack = network._nodes["edge1"].stack
    stack.rtnl.addr("del", index=stack.index("n6"), address="10.47.1.2", prefixlen=24)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (drop_route, "upf: route: asked for 10.45.0.1/32 via 10.48.1.2 dev n3-gnb1, found none"),
        (drop_qdisc, "gnb1: interface cell: asked for HTB at 40.0 Mbit/s, found no qdisc"),
        (stop_forwarding, "upf: sysctl net.ipv4.ip_forward: asked for 1, found 0"),
        (take_down, "ue1: interface radio-gnb2: asked for up, found down"),
        (drop_address, "edge1: interface n6: asked for address 10.47.1.2/24, found ["),
    ],
)
def test_what_is_not_as_asked_is_an_error(
    tamper: Callable[[Network], object], complaint: str
) -> None:
    def body() -> None:
        with Network(small()) as network:
            tamper(network)
            with pytest.raises(TopologyError) as caught:
                network.verify()
            assert complaint in str(caught.value)

    in_isolation(body)


def test_readback_says_what_the_kernel_holds() -> None:
    def body() -> None:
        with Network(small()) as network:
            gnb = network.readback["gnb1"]
            classes = {q["interface"]: q["rate_mbps"] for q in gnb["qdiscs"] if "rate_mbps" in q}
            assert classes == {"cell": 40.0, "n3": 20.0}
            assert gnb["interfaces"]["ue1"]["isolated"]
            assert gnb["sysctls"]["net.ipv4.ip_forward"] == "1"
            assert set(gnb["offloads"]["n3"]) >= {"tso", "gso", "gro"}

    in_isolation(body)


def test_a_ue_cannot_send_from_an_address_that_is_not_its_own() -> None:
    def body() -> None:
        with Network(small()) as network:
            ue, other, core = *network.ues, network.core
            cases = [
                (udp(core, core.address4), [other.address4, IPv4Address("10.46.1.2")]),
                (udp(core, core.address6), [other.address6, IPv6Address("fd00:46:1::2")]),
            ]
            forged = 0
            for at_core, addresses in cases:
                for address in addresses:
                    assert not reaches(udp(ue, address, foreign=True), at_core)
                    forged += 1
                    assert network.radio_drops() == {"gnb1": forged, "gnb2": 0}

    in_isolation(body)


def test_ues_of_a_cell_do_not_reach_each_other_past_the_gnb() -> None:
    def body() -> None:
        with Network(small()) as network:
            first, second = network.ues
            left = udp(first, IPv4Address("10.46.1.1"))
            assert not reaches(left, udp(second, IPv4Address("10.46.1.2")))

    in_isolation(body)


def test_programs_run_in_the_host_and_end_with_the_network() -> None:
    def body() -> None:
        with Network(small()) as network:
            program = network.host("ue1").popen(["sleep", "60"])
            link = f"/proc/{program.pid}/ns/net"
            deadline = time.monotonic() + 2
            while not same_namespace(link, network.ues[0].netns):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(TopologyError, match="no host ue3"):
                network.host("ue3")
        assert program.poll() is not None

    in_isolation(body)


def same_namespace(left: str, right: str) -> bool:
    return Path(left).stat().st_ino == Path(right).stat().st_ino


def test_a_failed_construction_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TopologyError("as if the kernel refused")

    monkeypatch.setattr("topologies.build.SpoofGuard", fail)

    def body() -> None:
        with pytest.raises(TopologyError, match="as if"), Network(small()):
            pass
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    in_isolation(body)
