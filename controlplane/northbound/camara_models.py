"""What CAMARA's requests and answers consist of: devices, servers, sessions, profiles.

Requests are strict: unknown properties, wrong types and null are 400 INVALID_ARGUMENT at any level.
Answers are made as plain JSON values; their models are there for the OpenAPI document.
"""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    StringConstraints,
    model_validator,
)

from controlplane.enforcement import Address
from controlplane.intent import QosProfileName
from controlplane.jsonmodel import JsonModel

MAX_INT32 = 2**31 - 1
_IPV6 = r"^[0-9a-fA-F:.]+$"  # without a zone
_SUBNET4 = (
    r"^([01]?[0-9]?[0-9]|2[0-4][0-9]|25[0-5])(\.([01]?[0-9]?[0-9]|2[0-4][0-9]|25[0-5])){3}"
    r"(/(3[0-2]|[12]?[0-9]))?$"
)
_SUBNET6 = r"^[0-9a-fA-F:.]+(/(12[0-8]|1[0-1][0-9]|[1-9]?[0-9]))?$"


def _is(read: Callable[[str], Any], what: str) -> AfterValidator:
    """Return a validator that keeps the text as it was given."""

    def check(text: str) -> str:
        try:
            read(text)
        except ValueError:
            raise ValueError(f"not an {what}") from None
        return text

    return AfterValidator(check)


Ipv4 = Annotated[str, StringConstraints(max_length=15), _is(IPv4Address, "IPv4 address")]
Ipv6 = Annotated[
    str, StringConstraints(max_length=45, pattern=_IPV6), _is(IPv6Address, "IPv6 address")
]
Ip = Annotated[str, StringConstraints(max_length=45, pattern=_IPV6), _is(ip_address, "IP address")]
Ipv4Subnet = Annotated[
    str,
    StringConstraints(max_length=18, pattern=_SUBNET4),
    _is(lambda text: IPv4Network(text, strict=False), "IPv4 subnet"),
]
Ipv6Subnet = Annotated[
    str,
    StringConstraints(max_length=49, pattern=_SUBNET6),
    _is(lambda text: IPv6Network(text, strict=False), "IPv6 subnet"),
]
Port = Annotated[int, Field(ge=1, le=65_535)]
Seconds = Annotated[int, Field(ge=1, le=MAX_INT32)]


class CamaraModel(JsonModel):
    """An object of which nothing is unknown, mistyped or null."""

    @model_validator(mode="before")
    @classmethod
    def _no_null(cls, given: Any) -> Any:
        if isinstance(given, dict) and any(value is None for value in given.values()):
            raise ValueError("a property that is null must be left out")
        return given


class DeviceIpv4Address(CamaraModel):
    """The address as the application server sees it, and how to tell devices behind it apart."""

    public_address: Ipv4
    private_address: Ipv4 | None = None
    public_port: Port | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.private_address is None and self.public_port is None:
            raise ValueError("publicAddress needs privateAddress or publicPort beside it")
        return self


class Device(CamaraModel):
    """A UE, by one or more identifiers."""

    phone_number: Annotated[str, StringConstraints(pattern=r"^\+[1-9][0-9]{4,14}$")] | None = None
    network_access_identifier: Annotated[str, StringConstraints(max_length=2048)] | None = None
    ipv4_address: DeviceIpv4Address | None = None
    ipv6_address: Ipv6 | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("at least one identifier is needed")
        return self


class ApplicationServer(CamaraModel):
    """Addresses, or one subnet of each family."""

    ip_addresses: Annotated[list[Ip], Field(min_length=1, max_length=16)] | None = None
    ipv4_address: Ipv4Subnet | None = None
    ipv6_address: Ipv6Subnet | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        subnets = self.ipv4_address is not None or self.ipv6_address is not None
        if (self.ip_addresses is not None) == subnets:
            raise ValueError("give ipAddresses, or ipv4Address and ipv6Address")
        listed = self.ip_addresses or ()
        if len(set(listed)) != len(listed):
            raise ValueError("an address is given twice")
        return self

    def addresses(self) -> list[Address] | None:
        """Return the servers, in order; None if a subnet is more than one address."""
        if self.ip_addresses is not None:
            found = {ip_address(text) for text in self.ip_addresses}
            return sorted(found, key=lambda address: (address.version, int(address)))
        subnets: list[IPv4Network | IPv6Network] = []
        if self.ipv4_address is not None:
            subnets.append(IPv4Network(self.ipv4_address, strict=False))
        if self.ipv6_address is not None:
            subnets.append(IPv6Network(self.ipv6_address, strict=False))
        if any(subnet.num_addresses != 1 for subnet in subnets):
            return None
        return [subnet.network_address for subnet in subnets]


class PortRange(CamaraModel):
    """First and last port, both included."""

    from_: Annotated[Port, Field(alias="from")]
    to: Port


class PortsSpec(CamaraModel):
    """Ports and ranges."""

    ranges: Annotated[list[PortRange], Field(min_length=1, max_length=65_536)] | None = None
    ports: Annotated[list[Port], Field(min_length=1, max_length=65_536)] | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give ranges, ports or both")
        return self


class BaseSessionInfo(CamaraModel):
    """What a request for a session and its description have in common."""

    device: Device | None = None
    application_server: ApplicationServer
    device_ports: PortsSpec | None = None
    application_server_ports: PortsSpec | None = None
    qos_profile: QosProfileName
    sink: Annotated[str, StringConstraints(max_length=2048)] | None = None
    duration: Seconds


class CreateSession(BaseSessionInfo):
    """Attributes required to create a session. What the credential must be, `sinks` knows."""

    sink_credential: (
        Annotated[
            dict[str, Annotated[str, StringConstraints(max_length=4096)]],
            Field(min_length=1, max_length=16),
        ]
        | None
    ) = None


class SessionInfo(BaseSessionInfo):
    """A session."""

    session_id: UUID
    started_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    qos_status: Literal["REQUESTED", "AVAILABLE", "UNAVAILABLE"]
    status_info: Literal["DURATION_EXPIRED", "NETWORK_TERMINATED", "DELETE_REQUESTED"] | None = None


class ExtendSessionDuration(CamaraModel):
    """How much longer."""

    requested_additional_duration: Seconds


class RetrieveSessionsInput(CamaraModel):
    """Whose sessions."""

    device: Device | None = None


class QosProfileDeviceRequest(CamaraModel):
    """Which profiles."""

    device: Device | None = None
    name: QosProfileName | None = None
    status: Literal["ACTIVE", "INACTIVE", "DEPRECATED"] | None = None


class Rate(CamaraModel):
    """A bit rate."""

    value: Annotated[int, Field(ge=0, le=1024)]
    unit: Literal["bps", "kbps", "Mbps", "Gbps", "Tbps"]


class Duration(CamaraModel):
    """A length of time."""

    value: Annotated[int, Field(ge=1, le=MAX_INT32)]
    unit: Literal["Seconds", "Milliseconds"]


class QosProfile(CamaraModel):
    """A QoS profile."""

    name: QosProfileName
    description: Annotated[str, StringConstraints(max_length=1024)] | None = None
    status: Literal["ACTIVE", "INACTIVE", "DEPRECATED"]
    target_min_upstream_rate: Rate | None = None
    max_upstream_rate: Rate | None = None
    target_min_downstream_rate: Rate | None = None
    max_downstream_rate: Rate | None = None
    min_duration: Duration | None = None
    max_duration: Duration | None = None
    priority: Annotated[int, Field(ge=1, le=100)] | None = None
    packet_delay_budget: Duration | None = None
    jitter: Duration | None = None
    packet_error_loss_rate: Annotated[int, Field(ge=1, le=10)] | None = None
