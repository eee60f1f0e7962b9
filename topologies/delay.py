"""Link delay: by netem where the kernel has it, else by a relay of ours in user space.

A delayed link goes through a node of its own, `wire-...`, whose two interfaces per link are joined
with the delay in between. So the ends of the link are the same whichever way it is delayed, and
their queueing disciplines stay free for shaping.
"""

import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from topologies import delay_measurement, shaping
from topologies.emulation import Emulation, Node
from topologies.errors import TopologyError
from topologies.relay import Relay
from upf.netns import Namespace


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link: a node, the interface to make there, and what it will be known by."""

    node: Node
    interface: str
    address4: IPv4Address
    mac: str


@functools.cache
def netem_missing() -> str | None:
    """Why netem cannot be used here, or None if it can: tried in a namespace made for it."""

    def attempt() -> str | None:
        with IPRoute() as rtnl:
            try:
                shaping.add_netem(rtnl, rtnl.link_lookup(ifname="lo")[0], 1)
            except NetlinkError as error:
                return f"the kernel has no netem (sch_netem): {error.args[-1]}"
        return None

    with Namespace() as throwaway:
        return throwaway.run(attempt)


@functools.cache
def relay_missing() -> str | None:
    """Why the user-space relay cannot be used here, or None if it can."""

    def attempt() -> str | None:
        try:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as packets:
                packets.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
                packets.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
        except OSError as error:
            return f"the kernel refuses packet sockets (CONFIG_PACKET, Linux 4.20): {error}"
        return None

    with Namespace() as throwaway:
        return throwaway.run(attempt)


def mechanism() -> str:
    """How links are delayed here: `netem` or `relay`. Raises TopologyError if neither works."""
    without_netem = netem_missing()
    if without_netem is None:
        return "netem"
    without_relay = relay_missing()
    if without_relay is None:
        return "relay"
    raise TopologyError(f"links cannot be delayed here: {without_netem}; {without_relay}")


@dataclass(eq=False, slots=True)
class _Wire:
    """One wire node: all its links have the same delay."""

    node: Node
    delay_ms: float
    links: list[tuple[LinkEnd, LinkEnd]]
    relay: Relay | None = None

    def interfaces(self, number: int) -> tuple[str, str]:
        return f"a{number}", f"b{number}"


class DelayedLinks:
    """All delayed links of a network."""

    def __init__(self, emulation: Emulation, add_node: Callable[[str], Node]) -> None:
        """`add_node` makes a node that passes nothing on and says nothing by itself."""
        self._emulation = emulation
        self._add_node = add_node
        self._wires: dict[str, _Wire] = {}
        self._mechanism = ""

    def connect(self, wire: str, a: LinkEnd, b: LinkEnd, delay_ms: float) -> None:
        """Link two ends through the wire node of that name. It forwards after `start`."""
        self._mechanism = self._mechanism or mechanism()
        if wire not in self._wires:
            self._wires[wire] = _Wire(self._add_node(wire), delay_ms, [])
        held = self._wires[wire]
        near, far = held.interfaces(len(held.links))
        for end, interface in ((a, near), (b, far)):
            self._emulation.add_link(end.node, end.interface, held.node, interface, addr1=end.mac)
            held.node.stack.bring_up(interface)
        if self._mechanism == "netem":
            self._join_by_netem(held, len(held.links))
        held.links.append((a, b))

    def start(self) -> None:
        """Start every relay. Returns when all forward."""
        if self._mechanism != "relay":
            return
        for name, wire in self._wires.items():
            pairs = [":".join(wire.interfaces(number)) for number in range(len(wire.links))]
            wire.relay = Relay(name, wire.node.pid, wire.delay_ms, pairs)
        for wire in self._wires.values():
            if wire.relay:
                wire.relay.wait_ready()

    def stop(self) -> None:
        """End every relay."""
        for wire in self._wires.values():
            if wire.relay:
                wire.relay.stop()

    def check_alive(self) -> None:
        """Raise TopologyError if a relay has died."""
        for wire in self._wires.values():
            if wire.relay:
                wire.relay.check_alive()

    def statistics(self) -> dict[str, list[dict[str, int]]]:
        """Per wire node: what its relay has forwarded, holds and has dropped, per direction."""
        return {name: wire.relay.statistics() for name, wire in self._wires.items() if wire.relay}

    def measure(self) -> dict[str, Any]:
        """Per wire node: the delay asked for and the one achieved on its first link.

        See `topologies.delay_measurement` for the keys; `mechanism` is `netem` or `relay`.
        """
        return {
            name: {
                "mechanism": self._mechanism,
                "asked_delay_ms": wire.delay_ms,
                **delay_measurement.measure(
                    wire.links[0][0].node.stack.netns,
                    str(wire.links[0][0].address4),
                    wire.links[0][1].node.stack.netns,
                    str(wire.links[0][1].address4),
                ),
            }
            for name, wire in self._wires.items()
        }

    @staticmethod
    def _join_by_netem(wire: _Wire, number: int) -> None:
        stack, bridge = wire.node.stack, f"wire{number}"
        stack.add_bridge(bridge)
        for interface in wire.interfaces(number):
            stack.add_port(bridge, interface, isolated=False)
            stack.delay(interface, wire.delay_ms)
        stack.bring_up(bridge)
