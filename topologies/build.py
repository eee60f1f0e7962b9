"""How an emulated network is built: hosts, links, addresses, routes, shaping, guards, in order."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from topologies import addressing
from topologies.addressing import Pair
from topologies.delay import DelayedLinks, LinkEnd
from topologies.emulation import Emulation, Node
from topologies.guard import SpoofGuard
from topologies.hosts import Anchor, Core, Gnb, Ue, Upf
from topologies.readback import Route
from topologies.spec import TopologySpec

_CELL = "cell"

# Order matters: switching forwarding on resets others. `*` covers every interface.
_SYSCTLS = {
    "net.ipv4.conf.*.rp_filter": "0",
    "net.ipv4.conf.*.accept_redirects": "0",
    "net.ipv4.conf.*.send_redirects": "0",
    "net.ipv6.conf.*.disable_ipv6": "0",
    "net.ipv6.conf.*.accept_redirects": "0",
    "net.ipv6.conf.*.accept_ra": "0",
    "net.ipv6.conf.*.accept_dad": "0",
    "net.ipv6.conf.*.dad_transmits": "0",
    "net.ipv6.conf.*.addr_gen_mode": "0",
}
_END_HOST = {"net.ipv4.ip_forward": "0", "net.ipv6.conf.all.forwarding": "0", **_SYSCTLS}
_ROUTER = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", **_SYSCTLS}


@dataclass(frozen=True, slots=True)
class _UpfLink:
    """A link between the UPF and another node, whose interface of it is named after the link."""

    node: str
    upf_interface: str
    interface: str
    upf_pair: Pair
    pair: Pair
    macs: tuple[str, str]
    delay_ms: float


class Builder:
    """Builds a network's parts in `build`; whatever needs undoing is pushed on `undo`."""

    def __init__(self, spec: TopologySpec, undo: ExitStack) -> None:
        self.ues: list[Ue] = []
        self.gnbs: dict[str, Gnb] = {}
        self.anchors: dict[str, Anchor] = {}
        self.upf: Upf
        self.core: Core
        self.nodes: dict[str, Node] = {}
        self.guards: dict[str, SpoofGuard] = {}
        self._spec = spec
        self._emulation = Emulation()
        undo.callback(self._emulation.stop)
        self.delays = DelayedLinks(self._emulation, self._add_wire_node)
        undo.callback(self.delays.stop)

    def build(self, progress: Callable[[str], None]) -> None:
        """Build everything but the paths of the UEs. Raises TopologyError."""
        progress("starting the hosts")
        self._add_hosts()
        progress("connecting the UPF")
        self._connect_upf()
        for gnb in self.gnbs.values():
            progress(f"connecting the cell of {gnb.name}")
            self._connect_cell(gnb)
        for ue in self.ues:
            self._give(self.nodes[ue.name], "lo", addressing.ue(ue.number))
        progress("starting link delays")
        self.delays.start()

    def _add_node(self, name: str, sysctls: dict[str, str]) -> int:
        node = self._emulation.add_node(name)
        self.nodes[name] = node
        node.stack.set_sysctls(sysctls)
        node.stack.bring_up("lo")
        pid: int = node.pid
        return pid

    def _add_wire_node(self, name: str) -> Node:
        # A wire has no addresses and never speaks: it only passes on what it sees.
        self._add_node(name, {"net.ipv4.ip_forward": "0", "net.ipv6.conf.*.disable_ipv6": "1"})
        return self.nodes[name]

    def _add_hosts(self) -> None:
        spec = self._spec
        self.upf = Upf(
            name="upf",
            pid=self._add_node("upf", _ROUTER),
            n3_interfaces={gnb.name: f"n3-{gnb.name}" for gnb in spec.gnbs},
            n6_interfaces={anchor.name: f"n6-{anchor.name}" for anchor in spec.anchors},
            core_interface="n6-core",
        )
        self.core = Core(
            name="core",
            pid=self._add_node("core", _END_HOST),
            address4=addressing.core().address4,
            address6=addressing.core().address6,
            upf_interface=self.upf.core_interface,
        )
        for number, gnb in enumerate(spec.gnbs, 1):
            self.gnbs[gnb.name] = Gnb(
                name=gnb.name,
                pid=self._add_node(gnb.name, _ROUTER),
                number=number,
                spec=gnb,
                upf_interface=self.upf.n3_interfaces[gnb.name],
            )
        for number, anchor in enumerate(spec.anchors, 1):
            self.anchors[anchor.name] = Anchor(
                name=anchor.name,
                pid=self._add_node(anchor.name, _END_HOST),
                number=number,
                spec=anchor,
                address4=addressing.n6_anchor(number).address4,
                address6=addressing.n6_anchor(number).address6,
                upf_interface=self.upf.n6_interfaces[anchor.name],
            )
        for number in range(1, spec.ues.count + 1):
            self.ues.append(
                Ue(
                    name=f"ue{number}",
                    pid=self._add_node(f"ue{number}", _END_HOST),
                    number=number,
                    address4=addressing.ue(number).address4,
                    address6=addressing.ue(number).address6,
                    serving_gnb=spec.gnbs[0].name,
                )
            )

    def _upf_links(self) -> list[_UpfLink]:
        links = [
            _UpfLink(
                "core",
                self.upf.core_interface,
                "n6",
                addressing.core_upf(),
                addressing.core(),
                addressing.upf_macs(49, 0),
                self._spec.core.delay_ms,
            )
        ]
        links += [
            _UpfLink(
                anchor.name,
                anchor.upf_interface,
                "n6",
                addressing.n6_upf(anchor.number),
                addressing.n6_anchor(anchor.number),
                addressing.upf_macs(47, anchor.number),
                anchor.spec.delay_ms,
            )
            for anchor in self.anchors.values()
        ]
        links += [
            _UpfLink(
                gnb.name,
                gnb.upf_interface,
                "n3",
                addressing.n3_upf(gnb.number),
                addressing.n3_gnb(gnb.number),
                addressing.upf_macs(48, gnb.number),
                gnb.spec.n3.delay_ms,
            )
            for gnb in self.gnbs.values()
        ]
        return links

    def _connect_upf(self) -> None:
        upf = self.nodes["upf"]
        for link in self._upf_links():
            node = self.nodes[link.node]
            self._link(
                f"wire-upf-{link.node}",
                LinkEnd(upf, link.upf_interface, link.upf_pair.address4, link.macs[0]),
                LinkEnd(node, link.interface, link.pair.address4, link.macs[1]),
                link.delay_ms,
            )
            for owner, interface, pair in (
                (upf, link.upf_interface, link.upf_pair),
                (node, link.interface, link.pair),
            ):
                owner.stack.bring_up(interface)
                self._give(owner, interface, pair)
            for anywhere, via in (
                ("0.0.0.0/0", link.upf_pair.address4),
                ("::/0", link.upf_pair.address6),
            ):
                node.stack.set_route(Route(anywhere, str(via), link.interface))
        for anchor in self.anchors.values():
            if anchor.spec.rate_mbps is not None:
                upf.stack.shape(anchor.upf_interface, anchor.spec.rate_mbps)
                self.nodes[anchor.name].stack.shape("n6", anchor.spec.rate_mbps)

    def _connect_cell(self, gnb: Gnb) -> None:
        node = self.nodes[gnb.name]
        node.stack.add_bridge(_CELL)
        node.stack.bring_up(_CELL)
        gnb_cell = addressing.cell_gnb(gnb.number)
        self._give(node, _CELL, gnb_cell)
        node.stack.shape(_CELL, gnb.spec.downlink_mbps)
        uplink_mbps = gnb.spec.uplink_mbps
        if gnb.spec.n3.rate_mbps is not None:
            uplink_mbps = min(uplink_mbps, gnb.spec.n3.rate_mbps)
            self.nodes["upf"].stack.shape(gnb.upf_interface, gnb.spec.n3.rate_mbps)
        node.stack.shape("n3", uplink_mbps)
        allowed: dict[str, list[IPv4Address | IPv6Address]] = {}
        for ue in self.ues:
            cell = addressing.cell_ue(gnb.number, ue.number)
            mac = addressing.cell_mac(gnb.number, ue.number)
            ue_node, radio = self.nodes[ue.name], f"radio-{gnb.name}"
            self._link(
                f"wire-{gnb.name}",
                LinkEnd(
                    node,
                    ue.name,
                    gnb_cell.address4,
                    addressing.cell_port_mac(gnb.number, ue.number),
                ),
                LinkEnd(ue_node, radio, cell.address4, mac),
                gnb.spec.radio.delay_ms,
            )
            node.stack.add_port(_CELL, ue.name, isolated=True)
            ue_node.stack.bring_up(radio)
            self._give(ue_node, radio, cell)
            node.stack.set_route(Route(f"{ue.address4}/32", str(cell.address4), _CELL))
            node.stack.set_route(Route(f"{ue.address6}/128", str(cell.address6), _CELL))
            allowed[ue.name] = [
                ue.address4,
                cell.address4,
                ue.address6,
                cell.address6,
                addressing.link_local(mac),
                IPv6Address("::"),
            ]
        self.guards[gnb.name] = SpoofGuard(gnb.netns, allowed)

    def _link(self, wire: str, a: LinkEnd, b: LinkEnd, delay_ms: float) -> None:
        if delay_ms > 0:
            self.delays.connect(wire, a, b, delay_ms)
        else:
            self._emulation.add_link(
                a.node, a.interface, b.node, b.interface, addr1=a.mac, addr2=b.mac
            )

    @staticmethod
    def _give(node: Node, interface: str, pair: Pair) -> None:
        node.stack.add_address(interface, pair.v4)
        node.stack.add_address(interface, pair.v6)
