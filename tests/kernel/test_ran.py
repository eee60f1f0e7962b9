"""QoS at a gNB: uplink and downlink classes, marked packets, and their end with the lease."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

from controlplane.enforcement import Binding, Flow, Install, QosFlow, Revoke
from controlplane.five_qi import DSCPS, qos_flow
from topologies import shaping
from upf import qos, ran
from upf.config import GateConfig, GnbPort
from upf.gate import Gate
from upf.netns import Namespace, connect

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
UE = {4: "10.45.0.1", 6: "fd00:45::1"}
SERVER = {4: "10.48.0.2", 6: "fd00:48::2"}
PORT = 7
CAPACITY_MBPS = 24
VIDEO = qos_flow(4, 2_000_000, 2_000_000, 4_000_000, 3_000_000)
SHARED = {80: 68}
LEASE_CLASS, SHARED_CLASS = qos.ROOT | 0x1000, qos.ROOT | 80
MS = 1_000_000


class Cell:
    """A UE, a gNB that routes between its cell and N3, and a server behind N3."""

    def __init__(self, undo: ExitStack) -> None:
        self.undo = undo
        self.hosts = {
            name: undo.enter_context(Namespace()) for name in ("ue", "gnb", "server", "upf")
        }
        gnb = self.hosts["gnb"]
        for host in self.hosts.values():
            host.run(lambda: _write("ipv6/conf/default/accept_dad", "0"))
        cell = (f"{UE[4]}/16", "10.45.255.1/16"), (f"{UE[6]}/64", "fd00:45::ffff/64")
        n3 = (f"{SERVER[4]}/24", "10.48.0.1/24"), (f"{SERVER[6]}/64", "fd00:48::1/64")
        connect(self.hosts["ue"], "radio", gnb, "cell", *cell)
        connect(self.hosts["server"], "n6", gnb, "n3", *n3)
        for name, via in (("ue", cell), ("server", n3)):
            with self.hosts[name].links() as links:
                for family, (_, gateway) in zip((2, 10), via, strict=True):
                    links.route("add", family=family, dst="default", gateway=gateway.split("/")[0])
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            gnb.run(lambda path=name: _write(path, "1"))
        with gnb.links() as links:
            for name in ("cell", "n3"):
                shaping.add_htb(links, links.link_lookup(ifname=name)[0], CAPACITY_MBPS)
        rate_bps = CAPACITY_MBPS * 1_000_000
        self.port = GnbPort(
            netns=gnb.path,
            cell_interface="cell",
            downlink_bps=rate_bps,
            n3_interface="n3",
            uplink_bps=rate_bps,
        )
        qos.extend(self.port.points, SHARED)
        qos.extend(self.port.points, SHARED)  # kept as it is
        self.gate = self.open_gate()

    def open_gate(self) -> Gate:
        config = GateConfig(
            n3_interfaces=("n3",),
            anchors=(),
            attachments=(),
            dscps=tuple(sorted(set(DSCPS.values()))),
        )
        upf = self.hosts["upf"].path
        gate = Gate(upf, config, in_place_renewal=True, gnbs=[self.port])
        self.undo.callback(gate.close)
        return gate

    def lease(self, lease_id: str, flow: QosFlow, ttl_ms: int = 60_000) -> Binding:
        return Binding(
            lease_id=lease_id,
            epoch=1,
            flows=tuple(Flow(ip_address(UE[v]), ip_address(SERVER[v])) for v in (4, 6)),
            anchor=None,
            qos=flow,
            expires_ns=time.monotonic_ns() + ttl_ms * MS,
        )

    def classes(self, interface: str) -> dict[int, int]:
        """Return how many packets each class has sent, by class id."""
        with self.hosts["gnb"].links() as links:
            return {
                found["handle"]: found.get_attr("TCA_STATS2").get_attr("TCA_STATS_BASIC")["packets"]
                for found in links.get_classes(index=links.link_lookup(ifname=interface)[0])
            }

    def pair(self, version: int, source: str, sink: str) -> tuple[socket.socket, socket.socket]:
        """Return a connected sender and a receiver that is told of DSCPs."""
        address = {"ue": UE[version], "server": SERVER[version]}
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        level, option = (
            (socket.IPPROTO_IP, 13)
            if version == 4
            else (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)
        )

        def make(bind: str) -> socket.socket:
            handle = socket.socket(family, socket.SOCK_DGRAM)
            handle.bind((bind, PORT))
            handle.settimeout(0.3)
            return handle

        sender = self.hosts[source].run(lambda: make(address[source]))
        receiver = self.hosts[sink].run(lambda: make(address[sink]))
        receiver.setsockopt(level, option, 1)
        receiver.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
        sender.connect((address[sink], PORT))
        return sender, receiver

    def sent(self, version: int, source: str, sink: str) -> tuple[int, set[int]]:
        """Send a datagram; return the DSCP it came with, and its class if it has one."""
        interface = "n3" if source == "ue" else "cell"
        before = self.classes(interface)
        sender, receiver = self.pair(version, source, sink)
        with sender, receiver:
            sender.send(b"x")
            _, ancillary, _, _ = receiver.recvmsg(100, 64)
        now = self.classes(interface)
        through = {one for one in now if now[one] != before.get(one, 0)}
        # Neighbour discovery may have been best effort meanwhile.
        return ancillary[0][2][0] >> 2, through - {qos.WHOLE, qos.ROOT | 9}


def _write(path: str, value: str) -> None:
    Path(f"/proc/sys/net/{path}").write_text(value)


@pytest.fixture
def cell() -> Iterator[Cell]:
    with ExitStack() as undo:
        made = Cell(undo)
        for version in (4, 6):
            until = time.monotonic() + 5
            while True:
                try:
                    made.sent(version, "ue", "server")
                    break
                except TimeoutError:
                    assert time.monotonic() < until
        yield made


BEST_EFFORT: tuple[int, set[int]] = (0, set())


@pytest.mark.parametrize("version", [4, 6])
def test_both_directions_have_the_class_of_the_lease(cell: Cell, version: int) -> None:
    assert cell.sent(version, "ue", "server") == cell.sent(version, "server", "ue") == BEST_EFFORT
    for flow, dscp, class_id in (
        (VIDEO, 34, LEASE_CLASS),
        (qos_flow(80, 0, 0, None, None), 18, SHARED_CLASS),
    ):
        cell.gate.apply([Install(lease := cell.lease("lease", flow))])
        assert cell.sent(version, "ue", "server") == (dscp, {class_id})
        assert cell.sent(version, "server", "ue") == (0, {class_id})  # the UPF marks
        cell.gate.apply([Revoke(lease)])
        assert cell.sent(version, "ue", "server") == BEST_EFFORT
    assert not any(map(qos.is_lease, [*cell.classes("cell"), *cell.classes("n3")]))


def test_mfbr_is_not_exceeded_uplink(cell: Cell) -> None:
    """Offered: more than MFBR for 1.2 s. A second's worth is between GFBR and MFBR."""
    cell.gate.apply([Install(cell.lease("lease", VIDEO))])
    sender, receiver = cell.pair(4, "ue", "server")
    payload = bytes(1_472)
    with sender, receiver:
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            for _ in range(2):
                sender.send(payload)
            time.sleep(0.004)
        got = 0
        try:
            while receiver.recv(2_000):
                got += 1
        except TimeoutError:
            pass
    queued = 40  # 100 ms worth waits at the end, and less than a packet each for the bursts
    assert 2_000_000 * 1.2 <= got * 12_000 <= (3_000_000 * 1.02 * 1.2) + queued * 12_000


def test_it_ends_with_the_lease_the_process_dead(cell: Cell) -> None:
    lease = cell.lease("lease", VIDEO, ttl_ms=400)
    cell.gate.apply([Install(lease)])
    assert cell.sent(4, "ue", "server")[0] == 34
    cell.gate.close()
    while time.monotonic_ns() < lease.expires_ns:
        time.sleep(0.01)
    for version in (4, 6):
        assert cell.sent(version, "ue", "server") == BEST_EFFORT
        assert cell.sent(version, "server", "ue") == BEST_EFFORT
    gate = cell.open_gate()
    assert not any(map(qos.is_lease, [*cell.classes("cell"), *cell.classes("n3")]))
    assert gate.reconcile([]).removed == ()


def test_a_new_process_brings_the_gnb_to_the_journal(cell: Cell) -> None:
    kept, gone = cell.lease("kept", VIDEO), cell.lease("gone", VIDEO)
    cell.gate.apply([Install(gone)])
    cell.gate.close()
    ran.remove(cell.port)
    gate = cell.open_gate()
    assert cell.sent(4, "ue", "server") == BEST_EFFORT
    gate.reconcile([kept])
    assert cell.sent(4, "ue", "server")[0] == 34
    assert len([one for one in cell.classes("n3") if qos.is_lease(one)]) == 1
    gate.reconcile([])
    assert cell.sent(4, "ue", "server") == BEST_EFFORT


def test_removed_it_leaves_the_gnb_as_it_was(cell: Cell) -> None:
    cell.gate.apply([Install(cell.lease("lease", VIDEO))])
    ran.remove(cell.port)
    qos.withdraw(cell.port.points)
    assert set(cell.classes("cell")) == set(cell.classes("n3")) == {qos.WHOLE, qos.ROOT | 9}
    assert cell.sent(4, "ue", "server") == BEST_EFFORT
