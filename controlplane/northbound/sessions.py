"""Sessions: create from an intent, read, extend, relocate, release."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StringConstraints

from controlplane.answers import Refusal
from controlplane.granting import SinkRequest
from controlplane.intent import Intent, Name
from controlplane.jsonmodel import JsonModel
from controlplane.northbound import documents
from controlplane.northbound.identity import Caller, Identified, Plane, owned
from controlplane.northbound.plane import ControlPlane
from controlplane.northbound.problem import responses
from controlplane.paging import Page
from controlplane.sinks import SinkCredential, SinkError, check_sink

MAX_EXTENSION_S = 2**31 - 1
MAX_LISTED = 1_000

router = APIRouter(tags=["sessions"])
SessionId = Annotated[str, Path(alias="sessionId", max_length=64, pattern=r"^[0-9a-fA-F-]+$")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=256,
        pattern=r"^[\x21-\x7e]+$",
        description="The same request under the same key is granted once.",
    ),
]


class SessionRequest(JsonModel):
    """What a UE wants. Others say for which UE: its name, or one of its addresses."""

    intent: Intent
    ue: Name | None = None
    ue_address: Annotated[str, StringConstraints(min_length=2, max_length=45)] | None = None
    sink: Annotated[str, StringConstraints(min_length=8, max_length=2048)] | None = None
    sink_credential: SinkCredential | None = None


class ExtensionRequest(JsonModel):
    """CAMARA's words: seconds beyond the present end."""

    requested_additional_duration: Annotated[int, Field(ge=1, le=MAX_EXTENSION_S)]


class RelocationRequest(JsonModel):
    """Where to: an anchor's name; "better": only if one is; nothing: to the best other one."""

    target: Name | None = None
    break_before_make: Annotated[
        bool, Field(description="For experiments; refused unless the controller allows it.")
    ] = False


class DeviceRequest(JsonModel):
    """Which UE."""

    ue: Name | None = None
    ue_address: Annotated[str, StringConstraints(min_length=2, max_length=45)] | None = None


@router.post(
    "/sessions",
    status_code=201,
    summary="Page: resolve an intent and grant a session",
    responses=responses(
        400, 401, 403, 404, 409, 413, 422, 429, 503, created="What was granted, and why there"
    ),
)
async def create(
    body: SessionRequest, caller: Identified, plane: Plane, key: Key = None
) -> Response:
    """Grant a lease to the best anchor that satisfies the intent, and open its user plane.

    The answer says how each candidate ranked and which constraint excluded each other one. With an
    `Idempotency-Key`, the same request is granted once: repeated, it answers 200 with the session
    as it is now.
    """
    caller.require("sessions:write")
    ue = _ue(caller, plane, body.ue, body.ue_address)
    granted = await plane.pager.page(
        Page(tenant=caller.tenant, ue=ue, intent=body.intent, key=key, sink=_sink(plane, body))
    )
    document = documents.grant(plane.controller, granted)
    status = 201 if granted.timeline is not None else 200
    headers = {"location": f"/sessions/{document['sessionId']}", "cache-control": "no-store"}
    return documents.Json(document, status, headers)


@router.get("/sessions", summary="List live sessions", responses=responses(400, 401, 403))
async def list_sessions(
    caller: Identified,
    plane: Plane,
    ue: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
) -> Response:
    """Return the live sessions that the caller may see, of one UE if `ue` names it."""
    caller.require("sessions:read")
    ledger = plane.controller.ledger
    if caller.ue is not None:
        found = ledger.sessions(ue=caller.ue)
    elif caller.is_operator:
        found = ledger.sessions(ue=ue)
    else:
        found = ledger.sessions(tenant=caller.tenant)
    seen = [s for s in found if caller.sees(s) and ue in (None, s.ue)]
    shown = [documents.session(plane.controller, session) for session in seen[:limit]]
    return JSONResponse({"sessions": shown, "total": len(seen)})


@router.post(
    "/retrieve-sessions",
    summary="List the live sessions of a UE",
    responses=responses(400, 401, 403),
)
async def retrieve(body: DeviceRequest, caller: Identified, plane: Plane) -> Response:
    """Return a UE's sessions, as far as the caller may see them."""
    caller.require("sessions:read")
    ue = _ue(caller, plane, body.ue, body.ue_address)
    found = [s for s in plane.controller.ledger.sessions(ue=ue) if caller.sees(s)]
    shown = [documents.session(plane.controller, session) for session in found]
    return JSONResponse({"sessions": shown, "total": len(found)})


@router.get(
    "/sessions/{sessionId}", summary="Read a session", responses=responses(400, 401, 403, 404)
)
async def get(
    session_id: SessionId, request: Request, caller: Identified, plane: Plane
) -> Response:
    """Return a session and its leases; an ended one for some minutes."""
    caller.require("sessions:read")
    return JSONResponse(documents.session(plane.controller, owned(request, caller, session_id)))


@router.delete(
    "/sessions/{sessionId}",
    status_code=204,
    summary="Release a session",
    responses=responses(400, 401, 403, 404, 409, 503),
)
async def delete(
    session_id: SessionId, request: Request, caller: Identified, plane: Plane
) -> Response:
    """End a session and close all that it opened."""
    caller.require("sessions:write")
    await plane.controller.release(owned(request, caller, session_id).session_id)
    return Response(status_code=204)


@router.post(
    "/sessions/{sessionId}/extend",
    summary="Extend a session",
    responses=responses(400, 401, 403, 404, 409, 413, 422, 503),
)
async def extend(
    session_id: SessionId,
    body: ExtensionRequest,
    request: Request,
    caller: Identified,
    plane: Plane,
) -> Response:
    """Let a session end later, and return it with a token that lasts as long.

    More in all than its QoS profile allows is an error.
    """
    caller.require("sessions:write")
    session = owned(request, caller, session_id)
    added_ms = body.requested_additional_duration * 1_000
    held = await plane.controller.extend(session.session_id, added_ms)
    document = documents.session(plane.controller, session)
    if held.terms.anchor is not None:
        document["aist"] = plane.controller.issuer.issue(held)
    return JSONResponse(document, headers={"cache-control": "no-store"})


@router.post(
    "/sessions/{sessionId}/relocate",
    summary="Relocate a session, make-before-break",
    responses=responses(400, 401, 403, 404, 409, 413, 422, 503),
)
async def relocate(
    session_id: SessionId,
    body: RelocationRequest,
    request: Request,
    caller: Identified,
    plane: Plane,
) -> Response:
    """Move a session to another anchor; whatever fails before the flip changes nothing."""
    caller.require("sessions:write")
    session = owned(request, caller, session_id)
    granted = await plane.relocator.relocate(
        session.session_id, body.target, break_before_make=body.break_before_make
    )
    return documents.Json(
        documents.grant(plane.controller, granted), headers={"cache-control": "no-store"}
    )


def _ue(caller: Caller, plane: ControlPlane, name: str | None, address: str | None) -> str:
    """Return the UE that a request is about. Raises Refusal."""
    if caller.anchor is not None:
        raise Refusal("NOT_ALLOWED", "an anchor has no sessions")
    if name is not None and address is not None:
        raise Refusal("INVALID", "name the UE once: ue or ueAddress")
    if address is not None:
        name = plane.ue_at(address)
    if caller.ue is not None:
        if name not in (None, caller.ue):
            raise Refusal("NOT_ALLOWED", "a UE asks for itself only")
        return caller.ue
    if name is None:
        raise Refusal("INVALID", "which UE? name it: ue or ueAddress")
    return plane.controller.subscriber(name).ue


def _sink(plane: ControlPlane, body: SessionRequest) -> SinkRequest | None:
    if body.sink is None:
        if body.sink_credential is not None:
            raise Refusal("INVALID", "sinkCredential without a sink")
        return None
    try:
        check_sink(body.sink, body.sink_credential, allow_http=plane.allow_http_sinks)
    except SinkError as error:
        raise Refusal("INVALID", f"sink: {error}") from None
    credential = body.sink_credential
    return SinkRequest(
        uri=body.sink,
        credential=None if credential is None else credential.model_dump_json(by_alias=True),
    )
