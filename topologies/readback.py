"""What a node was asked to be, what the kernel says it is, and the comparison of the two."""

import array
import fcntl
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from topologies import shaping
from topologies.errors import TopologyError

_MAIN_TABLE = 254
_IFF_UP = 1
_RATE_TOLERANCE = 0.001
_DELAY_TOLERANCE_MS = 0.001

_SIOCETHTOOL = 0x8946
_OFFLOADS = {
    "rx_checksum": 0x14,
    "tx_checksum": 0x16,
    "scatter_gather": 0x18,
    "tso": 0x1E,
    "gso": 0x23,
    "gro": 0x2B,
}


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table; `destination` in CIDR form."""

    destination: str
    gateway: str
    interface: str
    source: str | None = None

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.destination else 4

    def __str__(self) -> str:
        source = f" src {self.source}" if self.source else ""
        return f"{self.destination} via {self.gateway} dev {self.interface}{source}"


@dataclass(frozen=True, slots=True)
class PortAsked:
    """An interface that is a port of a bridge."""

    bridge: str
    isolated: bool


@dataclass(slots=True)
class Asked:
    """Everything a node's stack was told."""

    sysctls: dict[str, str] = field(default_factory=dict)
    up: set[str] = field(default_factory=set)
    ports: dict[str, PortAsked] = field(default_factory=dict)
    addresses: set[tuple[str, str]] = field(default_factory=set)
    routes: dict[str, Route] = field(default_factory=dict)
    rates_mbps: dict[str, float] = field(default_factory=dict)
    delays_ms: dict[str, float] = field(default_factory=dict)


def _sysctl_files(name: str) -> list[Path]:
    # Split before the wildcard is filled in: interface names may hold dots, sysctl names do not.
    return sorted(Path("/proc/sys").glob(name.replace(".", "/")))


def write_sysctls(wanted: Mapping[str, str]) -> None:
    """Write sysctls of the thread's network namespace, in the order given.

    `*` stands for all interfaces of now and, through `default`, for those to come.
    Raises TopologyError for one that does not exist or cannot be written.
    """
    for name, value in wanted.items():
        files = _sysctl_files(name)
        if not files:
            raise TopologyError(f"this kernel has no sysctl {name}")
        for file in files:
            try:
                file.write_text(value)
            except OSError as error:
                raise TopologyError(f"sysctl {name}={value}: {error.strerror}") from error


def read_sysctls(names: Iterable[str]) -> dict[str, str]:
    """Read sysctls; where `*` stands for several that differ, the values are joined by '|'."""
    return {
        name: "|".join(sorted({file.read_text().strip() for file in _sysctl_files(name)}))
        for name in names
    }


def read_links(rtnl: IPRoute) -> dict[str, Any]:
    """Interfaces, addresses, main-table routes and qdiscs of a namespace, JSON-able."""
    names: dict[int, str] = {}
    interfaces: dict[str, dict[str, Any]] = {}
    messages = list(rtnl.get_links())
    for message in messages:
        names[message["index"]] = message.get_attr("IFLA_IFNAME")
    for message in messages:
        port = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA")
        interfaces[names[message["index"]]] = {
            "mac": message.get_attr("IFLA_ADDRESS"),
            "mtu": message.get_attr("IFLA_MTU"),
            "up": bool(message["flags"] & _IFF_UP),
            "bridge": names.get(message.get_attr("IFLA_MASTER") or 0),
            "isolated": bool(port and port.get_attr("IFLA_BRPORT_ISOLATED")),
            "addresses": [],
        }
    for message in rtnl.get_addr():
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        interfaces[names[message["index"]]]["addresses"].append(f"{address}/{message['prefixlen']}")
    routes = [
        _read_route(message, names)
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in rtnl.get_routes(family=family, table=_MAIN_TABLE)
        if message.get_attr("RTA_TABLE") == _MAIN_TABLE
    ]
    return {
        "interfaces": interfaces,
        "routes": routes,
        "qdiscs": shaping.read_qdiscs(rtnl, names),
    }


def _read_route(message: Any, names: dict[int, str]) -> dict[str, Any]:
    anywhere = "::" if message["family"] == socket.AF_INET6 else "0.0.0.0"
    return {
        "destination": f"{message.get_attr('RTA_DST') or anywhere}/{message['dst_len']}",
        "gateway": message.get_attr("RTA_GATEWAY"),
        "interface": names.get(message.get_attr("RTA_OIF") or 0),
        "source": message.get_attr("RTA_PREFSRC"),
    }


def read_offloads() -> dict[str, dict[str, bool]]:
    """Which offloads are on, per interface of the thread's network namespace."""
    found: dict[str, dict[str, bool]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            if name != "lo":
                found[name] = {
                    offload: _ethtool_value(control, name, command)
                    for offload, command in _OFFLOADS.items()
                }
    return found


def _ethtool_value(control: socket.socket, name: str, command: int) -> bool:
    value = array.array("I", [command, 0])
    request = struct.pack("16sP16x", name.encode(), value.buffer_info()[0])
    try:
        fcntl.ioctl(control, _SIOCETHTOOL, request)
    except OSError:
        return False  # a device without this command has no such offload
    return bool(value[1])


def compare(node: str, asked: Asked, found: Mapping[str, Any], sysctls: Mapping[str, str]) -> None:
    """Raise TopologyError that names each thing asked for and what was found instead."""
    wrong = [*_compare_links(asked, found), *_compare_tc(asked, found["qdiscs"])]
    for name, value in asked.sysctls.items():
        if sysctls[name] != value:
            wrong.append(f"sysctl {name}: asked for {value}, found {sysctls[name]}")
    if wrong:
        raise TopologyError("\n".join(f"{node}: {what}" for what in wrong))


def _compare_links(asked: Asked, found: Mapping[str, Any]) -> Iterable[str]:
    interfaces = found["interfaces"]
    for name in sorted(asked.up):
        if not interfaces.get(name, {}).get("up"):
            yield f"interface {name}: asked for up, found {_state(interfaces.get(name))}"
    for name, port in asked.ports.items():
        link = interfaces.get(name, {})
        if (link.get("bridge"), link.get("isolated")) != (port.bridge, port.isolated):
            yield f"interface {name}: asked for {port}, found {link}"
    for name, address in sorted(asked.addresses):
        held = interfaces.get(name, {}).get("addresses", [])
        if address not in held:
            yield f"interface {name}: asked for address {address}, found {held}"
    for route in asked.routes.values():
        to_same = [r for r in found["routes"] if r["destination"] == route.destination]
        if to_same != [
            {
                "destination": route.destination,
                "gateway": route.gateway,
                "interface": route.interface,
                "source": route.source,
            }
        ]:
            yield f"route: asked for {route}, found {to_same or 'none'}"


def _state(link: Mapping[str, Any] | None) -> str:
    return "none" if link is None else "down"


def _compare_tc(asked: Asked, qdiscs: list[dict[str, Any]]) -> Iterable[str]:
    for name, rate in asked.rates_mbps.items():
        on_it = [q for q in qdiscs if q["interface"] == name]
        rates = [q["rate_mbps"] for q in on_it if "rate_mbps" in q and q["parent"] == "root"]
        if len(rates) != 1 or abs(rates[0] - rate) > rate * _RATE_TOLERANCE:
            yield f"interface {name}: asked for HTB at {rate} Mbit/s, found {on_it or 'no qdisc'}"
    for name, delay in asked.delays_ms.items():
        on_it = [q for q in qdiscs if q["interface"] == name]
        delays = [q["delay_ms"] for q in on_it if q["kind"] == "netem"]
        if len(delays) != 1 or abs(delays[0] - delay) > _DELAY_TOLERANCE_MS:
            yield f"interface {name}: asked for netem of {delay} ms, found {on_it or 'no qdisc'}"
