"""One node's network stack: set through netlink and /proc/sys, remembered, and read back.

Every setter records what was asked. `verify` reads the kernel and raises TopologyError where it
holds something else.
"""

import functools
from collections.abc import Callable, Mapping
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from topologies import readback, shaping
from topologies.errors import TopologyError
from topologies.readback import Asked, PortAsked, Route
from upf.netns import in_namespace, route_socket

Interface = IPv4Interface | IPv6Interface
_FAMILY = {4: 2, 6: 10}  # AF_INET, AF_INET6
_IFA_F_NODAD = 2


class Stack:
    """The network stack in the namespace at `netns` (a path)."""

    def __init__(self, node: str, netns: str) -> None:
        self.node = node
        self.netns = netns
        self._asked = Asked()
        self._indices: dict[str, int] = {}
        self._route: IPRoute | None = None

    @property
    def rtnl(self) -> IPRoute:
        """The rtnetlink socket in this namespace; opened on first use, then kept."""
        if self._route is None:
            self._route = route_socket(self.netns)
        return self._route

    def close(self) -> None:
        """Close the netlink socket. It opens again when needed."""
        if self._route is not None:
            self._route.close()
            self._route = None

    def set_sysctls(self, wanted: Mapping[str, str]) -> None:
        """Write sysctls by dotted name; `*` stands for every interface, also for later ones."""
        in_namespace(self.netns, lambda: readback.write_sysctls(wanted))
        self._asked.sysctls.update(wanted)

    def add_veth(self, name: str, mac: str, peer: str, peer_mac: str, peer_stack: "Stack") -> None:
        """Make a veth pair: one end here, the other in the peer's namespace. Both are down."""
        peer_pid = int(peer_stack.netns.split("/")[2])
        self._do(
            f"veth {name} to {peer_stack.node}",
            lambda: self.rtnl.link(
                "add",
                kind="veth",
                ifname=name,
                address=mac,
                peer={"ifname": peer, "address": peer_mac, "net_ns_pid": peer_pid},
            ),
        )

    def add_bridge(self, name: str) -> None:
        """Make a bridge that learns addresses and does nothing else (no STP, no snooping)."""
        self._do(
            f"bridge {name}",
            lambda: self.rtnl.link(
                "add", kind="bridge", ifname=name, br_stp_state=0, br_mcast_snooping=0
            ),
        )

    def index(self, interface: str) -> int:
        """The interface index. Raises TopologyError if there is no such interface."""
        if interface not in self._indices:
            found = self.rtnl.link_lookup(ifname=interface)
            if not found:
                raise TopologyError(f"{self.node}: there is no interface {interface}")
            self._indices[interface] = found[0]
        return self._indices[interface]

    def bring_up(self, *interfaces: str) -> None:
        """Set interfaces up."""
        for interface in interfaces:
            up = functools.partial(self.rtnl.link, "set", index=self.index(interface), state="up")
            self._do(f"{interface} up", up)
            self._asked.up.add(interface)

    def add_port(self, bridge: str, interface: str, *, isolated: bool) -> None:
        """Make the interface a port of the bridge; isolated ports reach the bridge only."""
        index, master = self.index(interface), self.index(bridge)
        self._do(
            f"{interface} in {bridge}",
            lambda: self.rtnl.link("set", index=index, master=master, state="up"),
        )
        self._do(
            f"{interface} isolated",
            lambda: self.rtnl.brport("set", index=index, isolated=int(isolated)),
        )
        self._asked.up.add(interface)
        self._asked.ports[interface] = PortAsked(bridge, isolated)

    def add_address(self, interface: str, address: Interface) -> None:
        """Add an address, usable at once (no duplicate address detection)."""
        more = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
        self._do(
            f"{address} on {interface}",
            lambda: self.rtnl.addr(
                "add",
                index=self.index(interface),
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                family=_FAMILY[address.version],
                **more,
            ),
        )
        self._asked.addresses.add((interface, str(address)))

    def set_route(self, route: Route) -> None:
        """Add the route, or replace the one to the same destination in one step."""
        more = {"prefsrc": route.source} if route.source else {}
        self._do(
            f"route {route}",
            lambda: self.rtnl.route(
                "replace",
                dst=route.destination,
                gateway=route.gateway,
                oif=self.index(route.interface),
                family=_FAMILY[route.version],
                **more,
            ),
        )
        self._asked.routes[route.destination] = route

    def shape(self, interface: str, rate_mbps: float) -> None:
        """Limit what leaves through the interface to the rate, by HTB."""
        self._do(
            f"HTB of {rate_mbps} Mbit/s on {interface}",
            lambda: shaping.add_htb(self.rtnl, self.index(interface), rate_mbps),
        )
        self._asked.rates_mbps[interface] = rate_mbps

    def delay(self, interface: str, delay_ms: float) -> None:
        """Delay what leaves through the interface, by netem."""
        self._do(
            f"netem of {delay_ms} ms on {interface}",
            lambda: shaping.add_netem(self.rtnl, self.index(interface), delay_ms),
        )
        self._asked.delays_ms[interface] = delay_ms

    def verify(self) -> dict[str, Any]:
        """Read everything back and return it, JSON-able, or raise TopologyError on a mismatch."""
        sysctls, offloads = in_namespace(
            self.netns,
            lambda: (
                readback.read_sysctls(self._asked.sysctls),
                readback.read_offloads(),
            ),
        )
        found = readback.read_links(self.rtnl)
        readback.compare(self.node, self._asked, found, sysctls)
        return {**found, "sysctls": sysctls, "offloads": offloads}

    def _do(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (NetlinkError, OSError) as error:
            raise TopologyError(f"{self.node}: {what}: the kernel refused it: {error}") from error
