"""CAMARA QoS Profiles: what applications may ask for, from the catalogue."""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, Response

from controlplane.answers import Refusal
from controlplane.catalogue import ProfileStatus, QosProfile
from controlplane.intent import QosProfileName
from controlplane.northbound.camara_common import CamaraModel, CamaraRoute, Device, device_of
from controlplane.northbound.identity import Identified, Plane

VERSION = "vwip"
MAX_LISTED = 100
MAX_RATE_VALUE = 1024
_RATE_UNITS = ("bps", "kbps", "Mbps", "Gbps", "Tbps")

router = APIRouter(tags=["QoS Profiles"], route_class=CamaraRoute)
Name = Annotated[str, Path(min_length=3, max_length=256, pattern=r"^[a-zA-Z0-9_.-]+$")]


class QosProfileDeviceRequest(CamaraModel):
    """Which profiles."""

    device: Device | None = None
    name: QosProfileName | None = None
    status: str | None = None


@router.post("/retrieve-qos-profiles", summary="Retrieve QoS profiles")
async def retrieve(body: QosProfileDeviceRequest, caller: Identified, plane: Plane) -> Response:
    """Return the profiles that match. All of them are available to every device."""
    caller.require("qos-profiles:read")
    if body.device is not None or caller.ue is not None:
        device_of(caller, plane, body.device)
    if body.status is not None and body.status not in ProfileStatus.__members__:
        raise Refusal("INVALID", "status is ACTIVE, INACTIVE or DEPRECATED")
    found = [
        profile
        for profile in plane.controller.catalogue.qos_profiles
        if body.name in (None, profile.name) and body.status in (None, profile.status.value)
    ]
    return JSONResponse([document(profile) for profile in found[:MAX_LISTED]])


@router.get("/qos-profiles/{name}", summary="Get QoS Profile for a given name")
async def get(name: Name, caller: Identified, plane: Plane) -> Response:
    """Return a profile."""
    caller.require("qos-profiles:read")
    try:
        return JSONResponse(document(plane.controller.catalogue.profile(name)))
    except KeyError:
        raise Refusal("PROFILE_NOT_FOUND", "The specified resource is not found.") from None


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
        ("packetDelayBudget", profile.packet_delay_budget_ms),
        ("jitter", profile.jitter_ms),
    ):
        if value_ms is not None:
            shown[name] = {"value": value_ms, "unit": "Milliseconds"}
    if profile.packet_error_loss_rate is not None:
        shown["packetErrorLossRate"] = profile.packet_error_loss_rate
    return shown


def rate(rate_bps: int) -> dict[str, Any]:
    """Return a Rate: at most 1024 of a unit, the smallest unit that allows it."""
    value, unit = rate_bps, 0
    while value > MAX_RATE_VALUE and unit < len(_RATE_UNITS) - 1:
        value //= 1000
        unit += 1
    return {"value": min(value, MAX_RATE_VALUE), "unit": _RATE_UNITS[unit]}
