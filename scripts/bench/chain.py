"""The network a packet is forwarded through: UE, UPF and anchor, one namespace each, two veths.

A chain is plain (its UPF has a route to the service addresses, and neither table nor marks) or
gated (its UPF has the real gate, policy routing and leases, and no such route).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from ipaddress import ip_address
from math import isqrt
from pathlib import Path

from controlplane.enforcement import Address, Binding, Flow, Install
from upf import routing
from upf.config import SERVICE_PREFIXES, UE_PREFIXES, AnchorPort, Attachment, GateConfig
from upf.gate import Gate
from upf.netns import Namespace, connect

ANCHOR = "edge1"
QOS_PROFILE = "bench"
QOS_CLASS_ID = 0x0001_0010  # tc class 1:10; there is no such class here: it costs its lookup
LEASE_TTL_NS = 3600 * 1_000_000_000
N3, N6 = "n3", "n6"
N3_LINK = (("10.90.0.1/30", "10.90.0.2/30"), ("fd00:90::1/126", "fd00:90::2/126"))
N6_LINK = (("10.99.0.1/30", "10.99.0.2/30"), ("fd00:99::1/126", "fd00:99::2/126"))


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


class Chain:
    """UE - UPF - anchor. All addresses of the UE and service prefixes are local to their ends."""

    def __init__(
        self, *, leases: int | None, in_place_renewal: bool = True, fast_path: bool = True
    ) -> None:
        """Build a chain with a gate and this many leases per family; `None`: a plain chain."""
        self._undo = ExitStack()
        self.ue, self.upf, self.anchor = (
            self._undo.enter_context(Namespace()) for _ in ("ue", "upf", "anchor")
        )
        self.gate: Gate | None = None
        try:
            self._build()
            if leases is None:
                self._route_plainly()
            else:
                self.gate = self._install(leases, in_place_renewal, fast_path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the namespaces, and of all that is in them."""
        self._undo.close()

    def _build(self) -> None:
        self.upf.run(_forward)
        connect(self.ue, "radio", self.upf, N3, *N3_LINK)
        connect(self.upf, N6, self.anchor, "n6", *N6_LINK)
        for namespace, prefixes in ((self.ue, UE_PREFIXES), (self.anchor, SERVICE_PREFIXES)):
            with namespace.links() as links:
                for prefix in prefixes:
                    links.route("add", dst=str(prefix), type="local", scope=254, oif=1, table=255)
        for number in range(2):
            _route(self.ue, SERVICE_PREFIXES[number], N3_LINK[number][1])
            _route(self.anchor, UE_PREFIXES[number], N6_LINK[number][0])
            _route(self.upf, UE_PREFIXES[number], N3_LINK[number][0])

    def _route_plainly(self) -> None:
        for number in range(2):
            _route(self.upf, SERVICE_PREFIXES[number], N6_LINK[number][1])

    def _install(self, leases: int, in_place_renewal: bool, fast_path: bool) -> Gate:
        families = [addresses(leases, version) for version in (4, 6)]
        gateway4, gateway6 = (ip_address(link[1].split("/")[0]) for link in N6_LINK)
        assert gateway4.version == 4 and gateway6.version == 6
        config = GateConfig(
            n3_interfaces=(N3,),
            anchors=(AnchorPort(name=ANCHOR, interface=N6, address4=gateway4, address6=gateway6),),
            attachments=tuple(Attachment(N3, ue) for ues, _ in families for ue in ues),
            qos_classes={QOS_PROFILE: QOS_CLASS_ID},
        )
        gate = Gate(self.upf.path, config, in_place_renewal=in_place_renewal, fast_path=fast_path)
        self._undo.callback(gate.close)
        routing.install(self.upf.path, config)
        expires_ns = time.monotonic_ns() + LEASE_TTL_NS
        pairs = [[(ue, service) for ue in ues for service in ons] for ues, ons in families]
        for number, flows in enumerate(zip(*pairs, strict=True)):
            binding = Binding(
                lease_id=f"bench-{number}",
                epoch=1,
                flows=tuple(Flow(ue, service) for ue, service in flows),
                anchor=ANCHOR,
                qos_profile=QOS_PROFILE,
                expires_ns=expires_ns,
            )
            gate.apply([Install(binding)])
        return gate


def _forward() -> None:
    settings = Path("/proc/sys/net")
    for name in ("all", "default"):
        (settings / "ipv4/conf" / name / "rp_filter").write_text("0")
        (settings / "ipv4/conf" / name / "send_redirects").write_text("0")
        (settings / "ipv6/conf" / name / "forwarding").write_text("1")
    (settings / "ipv4/ip_forward").write_text("1")


def _route(namespace: Namespace, prefix: object, gateway: str) -> None:
    with namespace.links() as links:
        links.route("add", dst=str(prefix), gateway=gateway.split("/")[0])
