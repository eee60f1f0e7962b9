"""The network a packet is forwarded through: UE, UPF and anchor, one namespace each, two veths.

A chain is plain (its UPF has a route to the service addresses, and neither table nor marks) or
gated (its UPF has the real gate, policy routing and leases, and no such route). Every benchmark's
gate is opened here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from math import isqrt
from pathlib import Path

from controlplane.enforcement import Address, Binding, Flow, Install, QosFlow
from controlplane.five_qi import DSCPS, qos_flow
from upf import routing
from upf.config import SERVICE_PREFIXES, UE_PREFIXES, AnchorPort, Attachment, GateConfig
from upf.features import Features
from upf.gate import Gate
from upf.netns import Namespace, connect

# There is no class of it here: it costs its lookup, and the DSCP that is written.
QOS = qos_flow(80, 0, 0, None, None)
BEST_EFFORT = qos_flow(9, 0, 0, None, None)  # neither class nor DSCP
LEASE_TTL_NS = 3600 * 1_000_000_000
LEASES_PER_BATCH = 100
N3, RADIO = "n3", "radio"
N3_LINK = (("10.90.0.1/30", "10.90.0.2/30"), ("fd00:90::1/126", "fd00:90::2/126"))
MAX_ANCHORS = 250


def n6(number: int) -> str:
    """Return the name of an anchor's link, at both of its ends."""
    return f"n6-{number}"


def n6_link(number: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the addresses (UPF, anchor) of an anchor's link, IPv4 and IPv6."""
    return (
        (f"10.99.{number}.1/30", f"10.99.{number}.2/30"),
        (f"fd00:99:{number}::1/126", f"fd00:99:{number}::2/126"),
    )


def edge(number: int) -> str:
    """Return the name of an anchor."""
    return f"edge{number}"


def gate_config(anchors: int, ues: Iterable[Address]) -> GateConfig:
    """Return the gate of a UPF with this many anchors, and these UEs behind N3."""
    ports = []
    for number in range(anchors):
        address4, address6 = (ip_address(link[1].split("/")[0]) for link in n6_link(number))
        assert address4.version == 4 and address6.version == 6
        ports.append(
            AnchorPort(
                name=edge(number), interface=n6(number), address4=address4, address6=address6
            )
        )
    return GateConfig(
        n3_interfaces=(N3,),
        anchors=tuple(ports),
        attachments=tuple(Attachment(N3, ue) for ue in ues),
        dscps=tuple(sorted(set(DSCPS.values()))),
    )


def sides(leases: int) -> tuple[int, int]:
    """Return (UEs, services): the most even product that makes this number of leases."""
    ues = next(count for count in range(isqrt(leases), 0, -1) if leases % count == 0)
    return ues, leases // ues


def addresses(leases: int, version: int) -> tuple[list[Address], list[Address]]:
    """Return the addresses of the UEs and of the services of that many leases."""
    index = 0 if version == 4 else 1
    first_ue = UE_PREFIXES[index].network_address + 1
    first_service = SERVICE_PREFIXES[index].network_address + 1
    ues, services = sides(leases)
    return (
        [first_ue + number for number in range(ues)],
        [first_service + number for number in range(services)],
    )


def open_gate(
    upf: Namespace, anchors: int, ues: Iterable[Address], features: Features, undo: ExitStack
) -> Gate:
    """Make a namespace a UPF with a gate, for every benchmark in the same way.

    Its links and its routes to the UEs are there already.
    """
    config = gate_config(anchors, ues)
    gate = Gate(
        upf.path,
        config,
        in_place_renewal=features.in_place_renewal,
        fast_path=features.tc_bpf,
    )
    undo.callback(gate.close)
    routing.install(upf.path, config)
    return gate


class Chain:
    """UE - UPF - anchor. All addresses of the UE and service prefixes are local to their ends.

    Several anchors are one namespace with a link each; a UE's leases are at one anchor, and UEs
    take the anchors in turn. Without a gate everything goes to the first.
    """

    def __init__(self, *, leases: int | None, features: Features, anchors: int = 1) -> None:
        """Build a chain whose gate knows the UEs of so many leases; `None`: a plain chain."""
        self._undo = ExitStack()
        self._leases, self._anchors = leases or 0, anchors
        self.ue, self.upf, self.anchor = (
            self._undo.enter_context(Namespace()) for _ in ("ue", "upf", "anchor")
        )
        self.n6 = tuple(n6(number) for number in range(anchors))
        self.gate: Gate | None = None
        try:
            self._build()
            if leases is None:
                self._route_plainly()
            else:
                ues = [ue for version in (4, 6) for ue in addresses(leases, version)[0]]
                self.gate = open_gate(self.upf, anchors, ues, features, self._undo)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the namespaces, and of all that is in them."""
        self._undo.close()

    def bindings(
        self, versions: Sequence[int] = (4, 6), *, expires_ns: int, epoch: int = 1
    ) -> list[Binding]:
        """Return the bindings of all leases: number n is of UE n // services to n % services."""
        pairs = []
        for version in versions:
            ues, services = addresses(self._leases, version)
            pairs.append([(ue, service) for ue in ues for service in services])
        services_per_ue = sides(self._leases)[1]
        return [
            Binding(
                lease_id=f"bench-{number}",
                epoch=epoch,
                flows=tuple(Flow(ue, service) for ue, service in flows),
                anchor=edge(number // services_per_ue % self._anchors),
                qos=QOS,
                expires_ns=expires_ns,
            )
            for number, flows in enumerate(zip(*pairs, strict=True))
        ]

    def grant(self, qos: QosFlow = QOS) -> None:
        """Install all leases, in both families, for an hour."""
        bindings = self.bindings(expires_ns=time.monotonic_ns() + LEASE_TTL_NS)
        install(self.gate, [replace(binding, qos=qos) for binding in bindings])

    def _build(self) -> None:
        self.upf.run(forward)
        connect(self.ue, RADIO, self.upf, N3, *N3_LINK)
        for number, name in enumerate(self.n6):
            connect(self.upf, name, self.anchor, name, *n6_link(number))
        make_local(self.ue, UE_PREFIXES)
        make_local(self.anchor, SERVICE_PREFIXES)
        for index in range(2):
            route(self.ue, SERVICE_PREFIXES[index], N3_LINK[index][1])
            route(self.anchor, UE_PREFIXES[index], n6_link(0)[index][0])
            route(self.upf, UE_PREFIXES[index], N3_LINK[index][0])
        for version in (4, 6) if self._leases and self._anchors > 1 else ():
            for number, ue in enumerate(addresses(self._leases, version)[0]):
                link = n6_link(number % self._anchors)[version == 6]
                route(self.anchor, ip_network(ue), link[0])

    def _route_plainly(self) -> None:
        for index in range(2):
            route(self.upf, SERVICE_PREFIXES[index], n6_link(0)[index][1])


def install(gate: Gate | None, bindings: Sequence[Binding]) -> None:
    """Install leases, some at a time."""
    assert gate is not None, "a plain chain has no leases"
    for start in range(0, len(bindings), LEASES_PER_BATCH):
        gate.apply([Install(binding) for binding in bindings[start : start + LEASES_PER_BATCH]])


def forward() -> None:
    """Make the namespace this is run in a router."""
    settings = Path("/proc/sys/net")
    for name in ("all", "default"):
        (settings / "ipv4/conf" / name / "rp_filter").write_text("0")
        (settings / "ipv4/conf" / name / "send_redirects").write_text("0")
        (settings / "ipv6/conf" / name / "forwarding").write_text("1")
    (settings / "ipv4/ip_forward").write_text("1")


def make_local(namespace: Namespace, prefixes: Iterable[IPv4Network | IPv6Network]) -> None:
    """Have every address of these prefixes belong to a namespace."""
    with namespace.links() as links:
        for prefix in prefixes:
            links.route("add", dst=str(prefix), type="local", scope=254, oif=1, table=255)


def route(namespace: Namespace, prefix: IPv4Network | IPv6Network, gateway: str) -> None:
    """Add a route; of the gateway's `address/length` the address counts."""
    with namespace.links() as links:
        links.route("add", dst=str(prefix), gateway=gateway.split("/")[0])
