"""For the operator, and for whoever verifies: status, mobility, policies, keys, metrics."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic.alias_generators import to_camel

from controlplane.intent import Name
from controlplane.jsonmodel import JsonModel
from controlplane.northbound.identity import Identified, Plane
from controlplane.northbound.problem import responses
from controlplane.policy import Policy

router = APIRouter(tags=["operations"])
TenantName = Annotated[str, Path(alias="tenant", max_length=64, pattern=r"^[\w.:-]+$")]


class JwkSet(JSONResponse):
    """Public keys."""

    media_type = "application/jwk-set+json"


class MobilityReport(JsonModel):
    """A handover has happened (compare TS 29.518, location report): the new serving gNB."""

    ue: Name
    gnb: Name


@router.get("/status", summary="What the kernel enforces", responses=responses(401, 403))
async def status(caller: Identified, plane: Plane) -> Response:
    """Return what the kernel enforces and drops, what is reserved, and how far the evidence is."""
    caller.require_operator()
    controller = plane.controller
    enforced = [
        {
            "leaseId": entry.lease_id,
            "epoch": entry.epoch,
            "ue": str(entry.flow.ue),
            "serviceAddress": str(entry.flow.service),
            "anchor": entry.anchor,
            "remainingMs": entry.remaining_ms,
            "uplinkPackets": entry.usage.uplink_packets,
            "uplinkBytes": entry.usage.uplink_bytes,
            "downlinkPackets": entry.usage.downlink_packets,
            "downlinkBytes": entry.usage.downlink_bytes,
        }
        for entry in await controller.enforcer.enforced()
    ]
    return JSONResponse(
        {
            "enforced": enforced,
            "drops": await controller.enforcer.drops(),
            "parked": {to_camel(name): n for name, n in asdict(await plane.read_parked()).items()},
            "slotsUsed": dict(controller.ledger.pools.slots_used()),
            "sessions": controller.ledger.live_sessions,
            "evidence": {"entries": plane.log.size, "root": plane.log.root().hex()},
        }
    )


@router.post(
    "/mobility-reports",
    status_code=204,
    summary="Report a handover",
    responses=responses(400, 401, 403, 413, 503),
)
async def mobility(body: MobilityReport, caller: Identified, plane: Plane) -> Response:
    """Say in which cell a UE is now; its sessions follow it to better anchors, if there are any."""
    caller.require_operator()
    await plane.keeper.moved(body.ue, body.gnb)
    return Response(status_code=204)


@router.get(
    "/tenants/{tenant}/policy",
    summary="Read a tenant's policy",
    responses=responses(400, 401, 403, 404),
)
async def policy(tenant: TenantName, caller: Identified, plane: Plane) -> Response:
    """Return what a tenant may have."""
    if caller.tenant != tenant:
        caller.require_operator()
    found = plane.controller.tenant(tenant).policy
    return JSONResponse(found.model_dump(mode="json", by_alias=True))


@router.put(
    "/tenants/{tenant}/policy",
    summary="Give a tenant another policy",
    responses=responses(400, 401, 403, 404, 413, 503),
)
async def set_policy(
    tenant: TenantName, body: Policy, caller: Identified, plane: Plane
) -> Response:
    """Change what a tenant may have. Live sessions that it does not allow are moved, or end."""
    caller.require_operator()
    plane.controller.tenant(tenant)
    await plane.keeper.set_policy(tenant, body)
    return JSONResponse(body.model_dump(mode="json", by_alias=True))


@router.post("/keys/rotate", summary="Sign with a new key", responses=responses(401, 403))
async def rotate(caller: Identified, plane: Plane) -> Response:
    """Sign tokens with a new key from now on; the old one stays published while tokens need it."""
    caller.require_operator()
    now_unix_ns = int(plane.unix_s() * 1e9)
    plane.keys.prune(now_unix_ns)
    key = plane.keys.rotate(now_unix_ns)
    return JSONResponse({"kid": key.kid})


@router.get(
    "/.well-known/jwks.json",
    summary="Public keys (RFC 7517)",
    response_class=JwkSet,
)
async def jwks(plane: Plane) -> Response:
    """Return the keys that AISTs, access tokens and notices are signed with."""
    return JwkSet(plane.keys.jwks())


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=PlainTextResponse,
    responses=responses(401, 403),
)
async def metrics(caller: Identified, plane: Plane) -> Response:
    """Return the metrics, for the operator."""
    caller.require_operator()
    plane.drops.update(await plane.controller.enforcer.drops())
    await plane.read_parked()
    body, content_type = plane.metrics.exposition()
    return Response(body, headers={"content-type": content_type})
