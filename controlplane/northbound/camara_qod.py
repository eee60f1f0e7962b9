"""CAMARA Quality-on-Demand: an application that knows its server asks for QoS alone.

The same leases underneath, the same gate in the kernel; nothing is steered. What the definition
leaves open, and what this implementation cannot do:

- A session is AVAILABLE as soon as it is created.
- Flows are pairs of addresses. Ports, and subnets of more than one address, are refused with
  SERVICE_NOT_APPLICABLE: the user plane matches addresses exactly.
- The service address of an AI service is refused likewise: that is paged for by intent.
- An extension beyond the profile's maximum is capped, as the definition says; the answer shows it.
"""

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Header, Path
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StringConstraints, model_validator

from controlplane.answers import Refusal
from controlplane.canonical import canonical
from controlplane.catalogue import SERVICE_PREFIX4, SERVICE_PREFIX6
from controlplane.enforcement import Address, Flow
from controlplane.intent import QosProfileName
from controlplane.ledger import Session
from controlplane.northbound import documents
from controlplane.northbound.camara_common import (
    CamaraModel,
    CamaraRoute,
    Device,
    Port,
    check_credential,
    device_of,
)
from controlplane.northbound.identity import Caller, Identified, Plane
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import QosRequest, SinkRequest
from controlplane.sinks import SinkError, check_sink, read_credential

VERSION = "vwip"
MAX_LISTED = 100
MAX_DURATION_S = 2**31 - 1

router = APIRouter(tags=["QoS Sessions"], route_class=CamaraRoute)
SessionId = Annotated[UUID, Path(alias="sessionId")]
Seconds = Annotated[int, Field(ge=1, le=MAX_DURATION_S)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=256)]
Subnet4 = Annotated[str, StringConstraints(max_length=18)]
Subnet6 = Annotated[str, StringConstraints(max_length=49)]


class ApplicationServer(CamaraModel):
    """Addresses, or one subnet of each family."""

    ip_addresses: (
        Annotated[
            list[Annotated[str, StringConstraints(max_length=45)]],
            Field(min_length=1, max_length=16),
        ]
        | None
    ) = None
    ipv4_address: Subnet4 | None = None
    ipv6_address: Subnet6 | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        subnets = self.ipv4_address is not None or self.ipv6_address is not None
        if (self.ip_addresses is not None) == subnets:
            raise ValueError("give ipAddresses, or ipv4Address and ipv6Address")
        for text in self.ip_addresses or ():
            ip_address(text)
        if len(set(self.ip_addresses or ())) != len(self.ip_addresses or ()):
            raise ValueError("an address is given twice")
        if self.ipv4_address is not None:
            IPv4Network(self.ipv4_address, strict=False)
        if self.ipv6_address is not None:
            IPv6Network(self.ipv6_address, strict=False)
        return self

    def addresses(self) -> list[Address]:
        """Return the servers. Raises Refusal for a subnet of several."""
        if self.ip_addresses is not None:
            return sorted({ip_address(text) for text in self.ip_addresses}, key=_in_order)
        subnets: list[IPv4Network | IPv6Network] = []
        if self.ipv4_address is not None:
            subnets.append(IPv4Network(self.ipv4_address, strict=False))
        if self.ipv6_address is not None:
            subnets.append(IPv6Network(self.ipv6_address, strict=False))
        for subnet in subnets:
            if subnet.num_addresses != 1:
                raise Refusal("SERVICE_NOT_APPLICABLE", f"{subnet} is more than one address")
        return [subnet.network_address for subnet in subnets]


class PortRange(CamaraModel):
    """First and last port, both included."""

    from_: Annotated[Port, Field(alias="from")]
    to: Port


class PortsSpec(CamaraModel):
    """Ports and ranges."""

    ranges: Annotated[list[PortRange], Field(min_length=1, max_length=65536)] | None = None
    ports: Annotated[list[Port], Field(min_length=1, max_length=65536)] | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.ranges is None and self.ports is None:
            raise ValueError("give ranges, ports or both")
        return self


class CreateSession(CamaraModel):
    """CAMARA's CreateSession."""

    device: Device | None = None
    application_server: ApplicationServer
    device_ports: PortsSpec | None = None
    application_server_ports: PortsSpec | None = None
    qos_profile: QosProfileName
    sink: Annotated[str, StringConstraints(max_length=2048)] | None = None
    sink_credential: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    duration: Seconds


class ExtendSessionDuration(CamaraModel):
    """How much longer."""

    requested_additional_duration: Seconds


class RetrieveSessionsInput(CamaraModel):
    """Whose sessions."""

    device: Device | None = None


@router.post("/sessions", status_code=201, summary="Creates a new session")
async def create(
    body: CreateSession, caller: Identified, plane: Plane, key: Key = None
) -> Response:
    """Create a QoS session. An `Idempotency-Key` (an extension) grants it once."""
    caller.require("quality-on-demand:sessions:create")
    ue, device = device_of(caller, plane, body.device)
    sink = _sink(plane, body)
    if body.device_ports is not None or body.application_server_ports is not None:
        raise Refusal("SERVICE_NOT_APPLICABLE", "flows are pairs of addresses: leave ports away")
    servers = body.application_server.addresses()
    request: dict[str, Any] = {
        "applicationServer": body.application_server.model_dump(by_alias=True, exclude_none=True),
        "qosProfile": body.qos_profile,
        "duration": body.duration,
    }
    if device is not None:
        request["device"] = device
    if body.sink is not None:
        request["sink"] = body.sink
    granted = await plane.pager.qos(
        QosRequest(
            tenant=caller.tenant,
            ue=ue,
            aisi=f"qod:{servers[0]}",
            flows=_flows(plane, ue, servers),
            profile=body.qos_profile,
            duration_ms=body.duration * 1_000,
            request=canonical(request).decode(),
            key=key,
            sink=sink,
        )
    )
    session = plane.controller.session(granted.lease.terms.session_id)
    return JSONResponse(_document(plane, session), 201)


@router.get("/sessions/{sessionId}", summary="Get QoS session information")
async def get(session_id: SessionId, caller: Identified, plane: Plane) -> Response:
    """Return a session; one that the network ended, for some minutes."""
    caller.require("quality-on-demand:sessions:read")
    return JSONResponse(_document(plane, _own(plane, caller, session_id)))


@router.delete("/sessions/{sessionId}", status_code=204, summary="Delete a QoS session")
async def delete(session_id: SessionId, caller: Identified, plane: Plane) -> Response:
    """End a session, or forget one that has ended."""
    caller.require("quality-on-demand:sessions:delete")
    session = _own(plane, caller, session_id)
    if session.live:
        await plane.controller.release(session.session_id)
    session.hidden = True
    return Response(status_code=204)


@router.post("/sessions/{sessionId}/extend", summary="Extend the duration of an active session")
async def extend(
    session_id: SessionId, body: ExtendSessionDuration, caller: Identified, plane: Plane
) -> Response:
    """Let a session end later, at the profile's maximum duration at the latest."""
    caller.require("quality-on-demand:sessions:update")
    controller = plane.controller
    session = _own(plane, caller, session_id)
    held = controller.committed(session.session_id)
    assert session.started_ns is not None
    profile = controller.catalogue.profile(held.terms.qos_profile)
    lasts_ms = (held.deadline_ns - session.started_ns) // 1_000_000
    added_ms = body.requested_additional_duration * 1_000
    added_ms = min(added_ms, profile.max_duration_s * 1_000 - lasts_ms)
    if added_ms > 0:
        await controller.extend(session.session_id, added_ms)
    return JSONResponse(_document(plane, session))


@router.post("/retrieve-sessions", summary="Get QoS session information for a device")
async def retrieve(body: RetrieveSessionsInput, caller: Identified, plane: Plane) -> Response:
    """Return the device's sessions that the caller has created."""
    caller.require("quality-on-demand:sessions:retrieve-by-device")
    ue, _ = device_of(caller, plane, body.device)
    found = [
        session
        for session in plane.controller.ledger.sessions(ue=ue)
        if caller.sees(session) and _request(plane, session) is not None
    ]
    return JSONResponse([_document(plane, session) for session in found[:MAX_LISTED]])


def _in_order(address: Address) -> tuple[int, int]:
    return address.version, int(address)


def _flows(plane: ControlPlane, ue: str, servers: list[Address]) -> tuple[Flow, ...]:
    subscriber = plane.controller.subscriber(ue)
    flows = []
    for server in servers:
        prefix = SERVICE_PREFIX4 if isinstance(server, IPv4Address) else SERVICE_PREFIX6
        if server in prefix:
            raise Refusal(
                "SERVICE_NOT_APPLICABLE", f"{server} is an AI service: page for it by intent"
            )
        own = subscriber.address4 if isinstance(server, IPv4Address) else subscriber.address6
        flows.append(Flow(own, server))
    return tuple(flows)


def _sink(plane: ControlPlane, body: CreateSession) -> SinkRequest | None:
    if body.sink is None:
        if body.sink_credential is not None:
            raise Refusal("INVALID_CREDENTIAL", "sinkCredential without a sink")
        return None
    credential = None if body.sink_credential is None else json.dumps(body.sink_credential)
    try:
        read = None if credential is None else read_credential(credential)
        check_sink(body.sink, read, allow_http=plane.allow_http_sinks)
    except SinkError as error:
        raise check_credential(error) from None
    return SinkRequest(uri=body.sink, credential=credential)


def _request(plane: ControlPlane, session: Session) -> str | None:
    """Return what was asked for when a session was created here; None for one paged for."""
    if session.hidden:
        return None
    return plane.controller.ledger.leases_of(session)[-1].terms.request


def _own(plane: ControlPlane, caller: Caller, session_id: UUID) -> Session:
    session = plane.controller.ledger.session(str(session_id))
    if session is None or not caller.sees(session) or _request(plane, session) is None:
        raise Refusal("SESSION_UNKNOWN", "The specified resource is not found.")
    return session


def _document(plane: ControlPlane, session: Session) -> dict[str, Any]:
    """Return a SessionInfo."""
    asked = _request(plane, session)
    assert asked is not None
    return {
        **json.loads(asked),
        "sessionId": session.session_id,
        **documents.qos_status(plane.controller, session),
    }
