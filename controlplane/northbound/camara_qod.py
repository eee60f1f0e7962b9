"""CAMARA Quality-on-Demand: an application that knows its server asks for QoS alone.

The same leases underneath, the same gate in the kernel; nothing is steered. What the definition
leaves open, and what this implementation cannot do:

- A session is AVAILABLE as soon as it is created.
- Flows are pairs of addresses. Ports, and subnets of more than one address, are refused with
  SERVICE_NOT_APPLICABLE: the user plane matches addresses exactly.
- The service address of an AI service is refused likewise, as that is paged for by intent; so is an
  anchor's own address, which UEs cannot reach.
- A caller sees the sessions that its tenant has created here and, if it is a UE, that are about it.
  Others', and those paged for by intent, are not there for it (404).
- A session that has expired, or that the network ended, is shown for some minutes. The latter is
  listed, and stands in the way of a new one, until its client deletes it.
- An extension beyond the profile's maximum is capped, as the definition says; the answer shows it.
"""

import json
from ipaddress import IPv4Address
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Path
from fastapi.responses import JSONResponse, Response

from controlplane.answers import Refusal
from controlplane.canonical import canonical
from controlplane.catalogue import SERVICE_PREFIX4, SERVICE_PREFIX6
from controlplane.enforcement import Address, Flow
from controlplane.granting import SinkRequest
from controlplane.lease import EndReason
from controlplane.ledger import QOS_ALONE, Session
from controlplane.northbound import documents
from controlplane.northbound.camara_common import CamaraRoute, device_of, errors
from controlplane.northbound.camara_models import (
    CreateSession,
    ExtendSessionDuration,
    RetrieveSessionsInput,
    SessionInfo,
)
from controlplane.northbound.identity import Caller, Identified, Plane
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import QosRequest
from controlplane.sinks import SinkError, check_sink, read_credential

VERSION = "vwip"
MAX_LISTED = 100

router = APIRouter(tags=["QoS Sessions"], route_class=CamaraRoute)
SessionId = Annotated[UUID, Path(alias="sessionId")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=256,
        pattern=r"^[\x21-\x7e]+$",
        description="Ours: the same request under the same key is granted once.",
    ),
]
SESSION: dict[str, Any] = {"description": "The session", "model": SessionInfo}


@router.post(
    "/sessions",
    status_code=201,
    summary="Creates a new session",
    responses={201: SESSION, **errors(400, 401, 403, 404, 409, 422, 429)},
)
async def create(
    body: CreateSession, caller: Identified, plane: Plane, key: Key = None
) -> Response:
    """Create a QoS session. Repeated under its key, the answer is the session as it is now."""
    caller.require("quality-on-demand:sessions:create")
    ue, device = device_of(caller, plane, body.device)
    sink = _sink(plane, body)
    if body.device_ports is not None or body.application_server_ports is not None:
        raise Refusal("SERVICE_NOT_APPLICABLE", "flows are pairs of addresses: leave ports away")
    servers = body.application_server.addresses()
    if servers is None:
        raise Refusal("SERVICE_NOT_APPLICABLE", "a subnet is more than one address: list them")
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
            aisi=f"{QOS_ALONE}{servers[0]}",
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


@router.get(
    "/sessions/{sessionId}",
    summary="Get QoS session information",
    responses={200: SESSION, **errors(400, 401, 403, 404, 429)},
)
async def get(session_id: SessionId, caller: Identified, plane: Plane) -> Response:
    """Return a session; an ended one that was not deleted, for some minutes."""
    caller.require("quality-on-demand:sessions:read")
    return JSONResponse(_document(plane, _own(plane, caller, session_id)))


@router.delete(
    "/sessions/{sessionId}",
    status_code=204,
    summary="Delete a QoS session",
    responses=errors(400, 401, 403, 404, 429),
)
async def delete(session_id: SessionId, caller: Identified, plane: Plane) -> Response:
    """End a session, or forget one that has ended."""
    caller.require("quality-on-demand:sessions:delete")
    session = _own(plane, caller, session_id)
    try:
        await plane.controller.release(session.session_id)
    except Refusal as refusal:
        if refusal.cause != "SESSION_ENDED":
            raise
    session.hidden = True
    return Response(status_code=204)


@router.post(
    "/sessions/{sessionId}/extend",
    summary="Extend the duration of an active session",
    responses={200: SESSION, **errors(400, 401, 403, 404, 409, 429)},
)
async def extend(
    session_id: SessionId, body: ExtendSessionDuration, caller: Identified, plane: Plane
) -> Response:
    """Let a session end later, at the profile's maximum duration at the latest."""
    caller.require("quality-on-demand:sessions:update")
    session = _own(plane, caller, session_id)
    added_ms = body.requested_additional_duration * 1_000
    await plane.controller.extend(session.session_id, added_ms, capped=True)
    return JSONResponse(_document(plane, session))


@router.post(
    "/retrieve-sessions",
    summary="Get QoS session information for a device",
    responses={
        200: {"description": "The sessions", "model": list[SessionInfo]},
        **errors(400, 401, 403, 404, 422, 429),
    },
)
async def retrieve(body: RetrieveSessionsInput, caller: Identified, plane: Plane) -> Response:
    """Return the device's sessions that the caller has created."""
    caller.require("quality-on-demand:sessions:retrieve-by-device")
    ue, _ = device_of(caller, plane, body.device)
    ledger = plane.controller.ledger
    found = [
        session
        for session in (*ledger.sessions(ue=ue), *ledger.lingering(ue))
        if _sees(plane, caller, session)
    ]
    return JSONResponse([_document(plane, session) for session in found[:MAX_LISTED]])


def _flows(plane: ControlPlane, ue: str, servers: list[Address]) -> tuple[Flow, ...]:
    subscriber = plane.controller.subscriber(ue)
    flows = []
    for server in servers:
        prefix = SERVICE_PREFIX4 if isinstance(server, IPv4Address) else SERVICE_PREFIX6
        if server in prefix:
            raise Refusal(
                "SERVICE_NOT_APPLICABLE", f"{server} is an AI service: page for it by intent"
            )
        if server in plane.anchor_by_address:
            raise Refusal("SERVICE_NOT_APPLICABLE", f"{server} cannot be reached by UEs")
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
        cause = "INVALID" if error.code == "INVALID_ARGUMENT" else error.code
        raise Refusal(cause, str(error)) from None
    return SinkRequest(uri=body.sink, credential=credential)


def _sees(plane: ControlPlane, caller: Caller, session: Session) -> bool:
    """Whether a session is there for a caller."""
    last = plane.controller.ledger.leases_of(session)[-1]
    return (
        last.terms.request is not None
        and caller.sees(session)
        and (caller.is_operator or session.tenant == caller.tenant)
        and not session.hidden
        and last.end_reason is not EndReason.RELEASED
    )


def _own(plane: ControlPlane, caller: Caller, session_id: UUID) -> Session:
    session = plane.controller.ledger.session(str(session_id))
    if session is None or not _sees(plane, caller, session):
        raise Refusal("SESSION_UNKNOWN", "The specified resource is not found.")
    return session


def _document(plane: ControlPlane, session: Session) -> dict[str, Any]:
    """Return a SessionInfo."""
    asked = plane.controller.ledger.leases_of(session)[-1].terms.request
    assert asked is not None, "it was created here"
    return {
        **json.loads(asked),
        "sessionId": session.session_id,
        **documents.qos_status(plane.controller, session),
    }
