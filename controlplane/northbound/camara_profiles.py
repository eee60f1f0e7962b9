"""CAMARA QoS Profiles: what applications may ask for, from the catalogue.

Offered to a caller is what its tenant's policy allows; to every device the same.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, Response

from controlplane.answers import Refusal
from controlplane.catalogue import QosProfile
from controlplane.northbound import camara_models
from controlplane.northbound.camara_common import CamaraRoute, device_of, errors
from controlplane.northbound.camara_models import QosProfileDeviceRequest
from controlplane.northbound.identity import Caller, Identified, Plane
from controlplane.northbound.plane import ControlPlane

VERSION = "vwip"
MAX_LISTED = 100
MAX_RATE_VALUE = 1024
_RATE_UNITS = ("bps", "kbps", "Mbps", "Gbps", "Tbps")

router = APIRouter(tags=["QoS Profiles"], route_class=CamaraRoute)
Name = Annotated[str, Path(min_length=3, max_length=256, pattern=r"^[a-zA-Z0-9_.-]+$")]


@router.post(
    "/retrieve-qos-profiles",
    summary="Retrieve QoS profiles",
    responses={
        200: {"description": "The profiles", "model": list[camara_models.QosProfile]},
        **errors(400, 401, 403, 404, 422, 429),
    },
)
async def retrieve(body: QosProfileDeviceRequest, caller: Identified, plane: Plane) -> Response:
    """Return the profiles that match."""
    caller.require("qos-profiles:read")
    if body.device is not None:
        device_of(caller, plane, body.device)
    found = [
        profile
        for profile in plane.controller.catalogue.qos_profiles
        if _offered(plane, caller, profile)
        and body.name in (None, profile.name)
        and body.status in (None, profile.status.value)
    ]
    return JSONResponse([document(profile) for profile in found[:MAX_LISTED]])


@router.get(
    "/qos-profiles/{name}",
    summary="Get QoS Profile for a given name",
    responses={
        200: {"description": "The profile", "model": camara_models.QosProfile},
        **errors(400, 401, 403, 404, 429),
    },
)
async def get(name: Name, caller: Identified, plane: Plane) -> Response:
    """Return a profile."""
    caller.require("qos-profiles:read")
    for profile in plane.controller.catalogue.qos_profiles:
        if profile.name == name and _offered(plane, caller, profile):
            return JSONResponse(document(profile))
    raise Refusal("PROFILE_NOT_FOUND", "The specified resource is not found.")


def _offered(plane: ControlPlane, caller: Caller, profile: QosProfile) -> bool:
    if caller.anchor is not None:  # it asks for no sessions
        return True
    allowed = plane.controller.tenant(caller.tenant).policy.qos_profiles
    return allowed is None or profile.name in allowed


def document(profile: QosProfile) -> dict[str, Any]:
    """Return CAMARA's QosProfile. Rates are whole in CAMARA's units: rounded down."""
    shown: dict[str, Any] = {
        "name": profile.name,
        "status": profile.status.value,
        "minDuration": {"value": profile.min_duration_s, "unit": "Seconds"},
        "maxDuration": {"value": profile.max_duration_s, "unit": "Seconds"},
        "priority": profile.priority_level,
    }
    if profile.description:
        shown["description"] = profile.description
    for name, rate_bps in (
        ("targetMinUpstreamRate", profile.guaranteed_uplink_bps or None),
        ("targetMinDownstreamRate", profile.guaranteed_downlink_bps or None),
        ("maxUpstreamRate", profile.max_uplink_bps),
        ("maxDownstreamRate", profile.max_downlink_bps),
    ):
        if rate_bps is not None:
            shown[name] = rate(rate_bps)
    for name, value_ms in (
        ("packetDelayBudget", profile.delay_budget_ms),
        ("jitter", profile.jitter_ms),
    ):
        if value_ms is not None:
            shown[name] = {"value": value_ms, "unit": "Milliseconds"}
    shown["packetErrorLossRate"] = profile.error_loss_exponent
    return shown


def rate(rate_bps: int) -> dict[str, Any]:
    """Return a Rate: at most 1024 of a unit, the smallest unit that allows it."""
    value, unit = rate_bps, 0
    while value > MAX_RATE_VALUE and unit < len(_RATE_UNITS) - 1:
        value //= 1000
        unit += 1
    return {"value": min(value, MAX_RATE_VALUE), "unit": _RATE_UNITS[unit]}
