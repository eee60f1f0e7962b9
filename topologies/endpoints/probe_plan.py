"""The probe's plan: which flows run between which sites, at what rate and for how long.

A *site* is a network namespace with a name. Its position in `ProbePlan.sites` is the site index
that packets and records carry. A *flow* is a numbered stream of datagrams of one UE in one
direction. The plan is plain JSON: `ProbePlan.load` and `ProbePlan.save`.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

MIN_PAYLOAD_BYTES = 24
MAX_PAYLOAD_BYTES = 1400
MAX_RATE_PPS = 100_000
MAX_SITES = 255


class PlanError(ValueError):
    """A probe plan that cannot be carried out; the message names the field."""


class Direction(StrEnum):
    """Which way a flow's datagrams go."""

    UPLINK = "uplink"
    """UE to service address; every anchor listens, the network chooses which one receives."""
    DOWNLINK = "downlink"
    """Service address to UE; one anchor sends at a time."""
    ROUNDTRIP = "roundtrip"
    """UE to service address and back: the anchor that receives a datagram echoes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A network namespace that holds sockets of the probe."""

    name: str
    netns: str = ""
    """A path to the namespace, such as `/proc/<pid>/ns/net`; empty for the probe's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One stream of datagrams between a UE and a service address."""

    id: int
    """0 to 65,535; unique in the plan."""
    ue: str
    """The UE's site."""
    direction: Direction
    ue_address: str
    ue_port: int
    service_address: str
    service_port: int
    """No two flows share service address and port: each has sockets of its own."""
    anchors: tuple[str, ...]
    """The sites that hold the service address. The first one sends first (downlink)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """Everything the probe needs to know before it starts."""

    sites: tuple[Site, ...]
    flows: tuple[Flow, ...]
    rate_pps: int
    """Packets per second of each flow."""
    max_duration_s: float
    """The sender stops after this time whatever happens."""
    payload_bytes: int = 64
    sender_cpu: int | None = None
    """The CPU that the sender alone uses; None: any. The driver keeps everything else off it."""
    waiting_time_ms: int = 300
    """How long the receivers go on after the last packet was sent (RFC 7680, section 2.3)."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def interval_ns(self) -> int:
        """Time between two packets of one flow."""
        return 1_000_000_000 // self.rate_pps

    @property
    def max_packets_per_flow(self) -> int:
        """The most packets that one flow can send within `max_duration_s`."""
        return int(self.rate_pps * self.max_duration_s) + 1

    def site_index(self, name: str) -> int:
        """The index that packets and records use for site `name`; KeyError if there is none."""
        for index, site in enumerate(self.sites):
            if site.name == name:
                return index
        raise KeyError(name)

    def flow(self, flow_id: int) -> Flow:
        """The flow with this id; KeyError if there is none."""
        for flow in self.flows:
            if flow.id == flow_id:
                return flow
        raise KeyError(flow_id)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbePlan:
        """Read a plan from JSON values; PlanError names what is wrong."""
        try:
            sites = tuple(Site(**site) for site in values["sites"])
            flows = tuple(
                Flow(
                    **{
                        **flow,
                        "direction": Direction(flow["direction"]),
                        "anchors": tuple(flow["anchors"]),
                    }
                )
                for flow in values["flows"]
            )
            return cls(**{**values, "sites": sites, "flows": flows})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"probe plan: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ProbePlan:
        """Read a plan from a JSON file."""
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise PlanError("probe plan: not a JSON object")
        return cls.from_dict(values)


def _check(plan: ProbePlan) -> None:
    _require(0 < plan.rate_pps <= MAX_RATE_PPS, f"rate_pps {plan.rate_pps}")
    _require(plan.max_duration_s > 0, f"max_duration_s {plan.max_duration_s}")
    _require(
        MIN_PAYLOAD_BYTES <= plan.payload_bytes <= MAX_PAYLOAD_BYTES,
        f"payload_bytes {plan.payload_bytes}: {MIN_PAYLOAD_BYTES} to {MAX_PAYLOAD_BYTES}",
    )
    if plan.sender_cpu is not None:
        _require(plan.sender_cpu in range(os.cpu_count() or 1), f"sender_cpu {plan.sender_cpu}")
    _require(plan.waiting_time_ms > 0, f"waiting_time_ms {plan.waiting_time_ms}")
    names = [site.name for site in plan.sites]
    _require(len(set(names)) == len(names) <= MAX_SITES, "sites: names repeat or too many sites")
    ids = [flow.id for flow in plan.flows]
    _require(bool(ids) and len(set(ids)) == len(ids), "flows: none, or ids repeat")
    services = {(flow.service_address, flow.service_port) for flow in plan.flows}
    _require(len(services) == len(ids), "flows: two share a service address and port")
    for flow in plan.flows:
        where = f"flow {flow.id}"
        _require(0 <= flow.id < 1 << 16, f"{where}: id is not 16 bits")
        _require(bool(flow.anchors), f"{where}: no anchors")
        for name in (flow.ue, *flow.anchors):
            _require(name in names, f"{where}: no site {name!r}")
        versions = {
            ipaddress.ip_address(address).version
            for address in (flow.ue_address, flow.service_address)
        }
        _require(len(versions) == 1, f"{where}: addresses of two families")
        for port in (flow.ue_port, flow.service_port):
            _require(0 < port < 1 << 16, f"{where}: port {port}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(f"probe plan: {message}")
