"""Anchors (AEXF): register, heartbeat, drain, deregister; and the catalogue they serve from."""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StringConstraints

from controlplane.answers import Refusal
from controlplane.catalogue import Anchor
from controlplane.clock import NS_PER_MS
from controlplane.fleet import FleetError, Heartbeat
from controlplane.intent import Name
from controlplane.jsonmodel import JsonModel
from controlplane.northbound import documents
from controlplane.northbound.identity import Caller, Identified, Plane
from controlplane.northbound.plane import ControlPlane
from controlplane.northbound.problem import responses

MAX_READY = 256

router = APIRouter(tags=["anchors"])
AnchorName = Annotated[str, Path(alias="name", max_length=64, pattern=r"^[\w.:-]+$")]


class HeartbeatRequest(JsonModel):
    """How an anchor is."""

    load: Annotated[float, Field(ge=0, le=1)]
    ready_aisis: Annotated[list[Name], Field(max_length=MAX_READY)]
    latency_ms: Annotated[float, Field(ge=0, le=3_600_000)] | None = None
    boot_id: Annotated[
        str,
        StringConstraints(min_length=1, max_length=64),
        Field(description="Another one: it has restarted, and forgotten its sessions."),
    ]
    since: Annotated[
        str | None,
        Field(max_length=64, description="The cursor of the answer before."),
    ] = None


@router.get("/anchors", summary="List anchors", responses=responses(401, 403))
async def list_anchors(caller: Identified, plane: Plane) -> Response:
    """Return every anchor as it is now; providers see their own."""
    caller.require("anchors:read")
    ledger = plane.controller.ledger
    views = ledger.fleet.views(ledger.pools.slots_used())
    shown = [
        documents.anchor(view, plane.provider_of(view.anchor.name))
        for view in views
        if caller.is_operator or plane.provider_of(view.anchor.name) == caller.tenant
    ]
    return JSONResponse({"anchors": shown})


@router.put(
    "/anchors/{name}",
    summary="Register an anchor",
    responses=responses(400, 401, 403, 404, 409, 413, 503),
)
async def register(name: AnchorName, body: Anchor, caller: Identified, plane: Plane) -> Response:
    """Make an anchor known, or change what is known of it. The user plane must reach it."""
    provider = _may_run(caller, plane, name)
    if body.name != name:
        raise Refusal("INVALID", f"the anchor is called {name} in the path, {body.name} within")
    described = body.model_copy(update={"provider": provider})
    try:
        plane.controller.catalogue.check_anchor(described)
    except ValueError as error:
        raise Refusal("INVALID", str(error)) from None
    with _fleet_errors():
        events = plane.controller.ledger.fleet.register(described, provider)
    await plane.keeper.record(events)
    return _shown(plane, name)


@router.post(
    "/anchors/{name}/heartbeat",
    summary="Say that an anchor lives, and how it is",
    responses=responses(400, 401, 403, 404, 413, 503),
)
async def heartbeat(
    name: AnchorName, body: HeartbeatRequest, caller: Identified, plane: Plane
) -> Response:
    """Take a heartbeat; the answer holds the tokens to refuse that are new `since` the last one.

    One with `nbf` and `flows` is of a session that has moved away: what it has open here (pairs of
    UE and service address) is to be drained, and is cut at `nbf`. The answer also says how many ms
    later to send the next heartbeat. Once an anchor has sent one it is watched: after the failure
    detection budget of silence its sessions are anchored anew elsewhere.
    """
    _may_run(caller, plane, name)
    with _fleet_errors():
        await plane.keeper.heartbeat(
            name,
            Heartbeat(
                load=body.load,
                ready_aisis=frozenset(body.ready_aisis),
                latency_ms=body.latency_ms,
                boot_id=body.boot_id,
            ),
        )
    revocations, cursor = plane.revocations.since(body.since, name)
    return JSONResponse(
        {
            "revocations": revocations,
            "cursor": cursor,
            "keys": list(plane.keys.public_keys()),
            "intervalMs": plane.controller.ledger.fleet.heartbeat_interval_ns / NS_PER_MS,
        }
    )


@router.post(
    "/anchors/{name}/drain",
    summary="Drain an anchor",
    responses=responses(400, 401, 403, 404, 503),
)
async def drain(name: AnchorName, caller: Identified, plane: Plane) -> Response:
    """Give it nothing new, and move its sessions away, make-before-break."""
    _may_run(caller, plane, name)
    with _fleet_errors():
        events = plane.controller.ledger.fleet.drain(name)
    await plane.keeper.record(events)
    return _shown(plane, name)


@router.delete(
    "/anchors/{name}",
    status_code=204,
    summary="Deregister an anchor",
    responses=responses(400, 401, 403, 404, 503),
)
async def deregister(name: AnchorName, caller: Identified, plane: Plane) -> Response:
    """Forget an anchor. Sessions that are still there are moved away first, as far as they can."""
    _may_run(caller, plane, name)
    with _fleet_errors():
        events = plane.controller.ledger.fleet.deregister(name)
    await plane.keeper.record(events)
    return Response(status_code=204)


@router.get("/services", summary="List services and models", responses=responses(401, 403))
async def services(caller: Identified, plane: Plane) -> Response:
    """Return the catalogue: AI services, and the models behind them with what they require."""
    caller.require("models:read")
    catalogue = plane.controller.catalogue
    shown: dict[str, Any] = {
        "services": [service.model_dump(mode="json") for service in catalogue.services],
        "models": [model.model_dump(mode="json") for model in catalogue.models],
    }
    return JSONResponse(shown)


def _may_run(caller: Caller, plane: ControlPlane, name: str) -> str:
    """Return the provider on whose behalf the caller runs an anchor. Raises Refusal."""
    caller.require("anchors:write")
    if caller.ue is not None or caller.anchor not in (None, name):
        raise Refusal("NOT_ALLOWED", f"only its provider may speak for anchor {name}")
    if caller.is_operator:
        return plane.provider_of(name)
    known = plane.controller.ledger.fleet.provider(name)
    if known not in (None, caller.tenant):
        raise Refusal("ANCHOR_UNKNOWN", f"there is no anchor {name}")
    return caller.tenant


class _fleet_errors:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, FleetError):
            raise Refusal(error.cause, str(error)) from error


def _shown(plane: ControlPlane, name: str) -> Response:
    ledger = plane.controller.ledger
    for view in ledger.fleet.views(ledger.pools.slots_used()):
        if view.anchor.name == name:
            return JSONResponse(documents.anchor(view, plane.provider_of(name)))
    raise Refusal("ANCHOR_UNKNOWN", f"there is no anchor {name}")
