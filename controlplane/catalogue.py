"""The catalogue: which AI services exist, and which anchors can run them. Read from a YAML file."""

from collections import Counter
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from controlplane.configfile import ConfigModel, load_yaml
from controlplane.enforcement import Flow
from controlplane.intent import Name, PipelineTag

SERVICE_PREFIX4 = IPv4Network("198.18.0.0/15")  # RFC 2544; here: service addresses
SERVICE_PREFIX6 = IPv6Network("fd00:a151::/64")


class Service(ConfigModel):
    """An AI service: its identity (AISI) and the stable addresses it is reached at anywhere."""

    aisi: Name
    task: PipelineTag
    model: str
    address4: IPv4Address
    address6: IPv6Address
    port: Annotated[int, Field(ge=1, le=65535)] = 8000

    @model_validator(mode="after")
    def _addresses_are_service_addresses(self) -> Self:
        if self.address4 not in SERVICE_PREFIX4:
            raise ValueError(f"address4 {self.address4} is not in {SERVICE_PREFIX4}")
        if self.address6 not in SERVICE_PREFIX6:
            raise ValueError(f"address6 {self.address6} is not in {SERVICE_PREFIX6}")
        return self

    def flows(self, ue4: IPv4Address, ue6: IPv6Address) -> tuple[Flow, ...]:
        """Return the flows between a UE and this service, one an address family."""
        return (Flow(ue4, self.address4), Flow(ue6, self.address6))


class Hosting(ConfigModel):
    """A service that an anchor can run, and how long a request takes there."""

    aisi: Name
    service_time_ms: Annotated[float, Field(gt=0)]


class Anchor(ConfigModel):
    """An AI execution anchor (AEXF)."""

    name: Name
    region: Name
    trust_tier: Annotated[int, Field(ge=0, le=10)]  # higher is more trusted
    slots: Annotated[int, Field(ge=1)]  # sessions at a time
    cost: Annotated[float, Field(ge=0)]  # per 1,000 requests, in the operator's unit
    path_rtt_ms: Annotated[float, Field(ge=0)] = 0.0  # UPF to anchor and back, expected
    hosts: Annotated[list[Hosting], Field(min_length=1)]

    def hosting(self, aisi: str) -> Hosting | None:
        """Return how this anchor runs a service; None if it does not."""
        return next((hosting for hosting in self.hosts if hosting.aisi == aisi), None)


class QosProfile(ConfigModel):
    """A QoS profile: the share of a cell's downlink that its leases are guaranteed together."""

    name: Name
    guaranteed_share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Catalogue(ConfigModel):
    """QoS profiles, services and anchors."""

    qos_profiles: Annotated[list[QosProfile], Field(min_length=1, max_length=64)]
    services: Annotated[list[Service], Field(min_length=1)]
    anchors: Annotated[list[Anchor], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (
            ("QoS profile", [profile.name for profile in self.qos_profiles]),
            ("AISI", [service.aisi for service in self.services]),
            ("anchor", [anchor.name for anchor in self.anchors]),
            ("service address", [service.address4 for service in self.services]),
            ("service address", [service.address6 for service in self.services]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice")
        if sum(profile.guaranteed_share for profile in self.qos_profiles) > 1:
            raise ValueError("the QoS profiles' guaranteed shares add up to more than 1")
        known = {service.aisi for service in self.services}
        for anchor in self.anchors:
            for hosting in anchor.hosts:
                if hosting.aisi not in known:
                    raise ValueError(
                        f"anchor {anchor.name} hosts {hosting.aisi}, which is no service"
                    )
        return self

    def qos_shares(self) -> dict[str, float]:
        """Return each QoS profile's guaranteed share of a cell."""
        return {profile.name: profile.guaranteed_share for profile in self.qos_profiles}

    def service(self, aisi: str) -> Service:
        """Return a service by its AISI. KeyError if there is none."""
        for service in self.services:
            if service.aisi == aisi:
                return service
        raise KeyError(aisi)

    def anchor(self, name: str) -> Anchor:
        """Return an anchor by name. KeyError if there is none."""
        for anchor in self.anchors:
            if anchor.name == name:
                return anchor
        raise KeyError(name)


def load_catalogue(path: Path) -> Catalogue:
    """Read a catalogue file. ConfigError names file and line of whatever is wrong."""
    return load_yaml(path, Catalogue)
