"""What CAMARA's APIs share (Commonalities r4.3): errors, the correlator, who a device is.

`CamaraRoute` turns whatever goes wrong in an operation into CAMARA's own form of error, and returns
each request's `x-correlator`; `unrouted` does so where there is no operation.
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address
from math import ceil
from typing import Annotated, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError
from controlplane.northbound.camara_models import Device
from controlplane.northbound.identity import Caller
from controlplane.northbound.plane import ControlPlane
from controlplane.store import StoreError

ROOTS = ("/quality-on-demand/", "/qos-profiles/")
CORRELATOR = "x-correlator"
_CORRELATOR = re.compile(r"[a-zA-Z0-9_:;./<>{}-]{0,256}")

# Refusal.cause -> status and code. Codes with a dot are Quality-on-Demand's own.
ERRORS = {
    "MALFORMED": (400, "INVALID_ARGUMENT"),
    "INVALID": (400, "INVALID_ARGUMENT"),
    "QOS_PROFILE_UNKNOWN": (400, "INVALID_ARGUMENT"),
    "DURATION_OUT_OF_RANGE": (400, "QUALITY_ON_DEMAND.DURATION_OUT_OF_RANGE"),
    "INVALID_SINK": (400, "INVALID_SINK"),
    "INVALID_CREDENTIAL": (400, "INVALID_CREDENTIAL"),
    "INVALID_TOKEN": (400, "INVALID_TOKEN"),
    "UNAUTHENTICATED": (401, "UNAUTHENTICATED"),
    "NOT_ALLOWED": (403, "PERMISSION_DENIED"),
    "QOS_PROFILE_NOT_ALLOWED": (403, "PERMISSION_DENIED"),
    "LEASE_QUOTA_EXCEEDED": (403, "PERMISSION_DENIED"),
    "TENANT_UNKNOWN": (403, "PERMISSION_DENIED"),
    "SESSION_UNKNOWN": (404, "NOT_FOUND"),
    "PROFILE_NOT_FOUND": (404, "NOT_FOUND"),
    "UE_UNKNOWN": (404, "IDENTIFIER_NOT_FOUND"),
    "SESSION_EXISTS": (409, "CONFLICT"),
    "KEY_REUSED": (409, "CONFLICT"),
    "SESSION_ENDED": (409, "QUALITY_ON_DEMAND.SESSION_EXTENSION_NOT_ALLOWED"),
    "NOT_EXTENDED": (409, "QUALITY_ON_DEMAND.SESSION_EXTENSION_NOT_ALLOWED"),
    "MISSING_IDENTIFIER": (422, "MISSING_IDENTIFIER"),
    "UNNECESSARY_IDENTIFIER": (422, "UNNECESSARY_IDENTIFIER"),
    "UNSUPPORTED_IDENTIFIER": (422, "UNSUPPORTED_IDENTIFIER"),
    "SERVICE_NOT_APPLICABLE": (422, "SERVICE_NOT_APPLICABLE"),
    "NO_BANDWIDTH": (422, "SERVICE_NOT_APPLICABLE"),
    "PRIVATE_KEY_JWT_NOT_CONFIGURED": (422, "PRIVATE_KEY_JWT_NOT_CONFIGURED"),
    "QOS_PROFILE_INACTIVE": (422, "QUALITY_ON_DEMAND.QOS_PROFILE_NOT_APPLICABLE"),
    "RATE_LIMITED": (429, "TOO_MANY_REQUESTS"),
    "SESSION_QUOTA_EXCEEDED": (429, "QUOTA_EXCEEDED"),
    "BANDWIDTH_QUOTA_EXCEEDED": (429, "QUOTA_EXCEEDED"),
}
UNAVAILABLE = (503, "UNAVAILABLE")  # of every other cause
_CODE_OF_STATUS = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}  # where there is no operation
_OF_RANGE = {"greater_than_equal", "less_than_equal"}


class ErrorInfo(BaseModel):
    """CAMARA's form of every error."""

    status: Annotated[int, Field(ge=100, le=599)]
    code: Annotated[str, Field(max_length=96)]
    message: Annotated[str, Field(max_length=512)]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe errors of an operation for the OpenAPI document."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "model": ErrorInfo}
        for status in statuses
    }
    return described | {"default": {"description": "Any other error", "model": ErrorInfo}}


def camara_error(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an ErrorInfo."""
    content = {"status": status, "code": code, "message": message[:512]}
    return JSONResponse(content, status, None if headers is None else dict(headers))


class CamaraRoute(APIRoute):
    """An operation under a CAMARA path."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, errors and correlator included."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            if not _CORRELATOR.fullmatch(request.headers.get(CORRELATOR, "")):
                return camara_error(400, "INVALID_ARGUMENT", f"{CORRELATOR} is malformed")
            try:
                response = await handle(request)
            except Refusal as refusal:
                response = _refused(refusal)
            except RequestValidationError as error:
                response = _invalid(error)
            except HTTPException as error:
                response = camara_error(error.status_code, "INVALID_ARGUMENT", error.detail)
            except (StoreError, EnforcementError):
                response = camara_error(*UNAVAILABLE, "the service is not available now")
            return _correlated(request, response)

        return handled


def unrouted(request: Request, error: HTTPException, headers: Mapping[str, str]) -> Response:
    """Return the error for a path under `ROOTS` or a method that there is not."""
    code = _CODE_OF_STATUS.get(error.status_code, "INVALID_ARGUMENT")
    return _correlated(request, camara_error(error.status_code, code, error.detail, headers))


def _correlated(request: Request, response: Response) -> Response:
    correlator = request.headers.get(CORRELATOR)
    if correlator is not None and _CORRELATOR.fullmatch(correlator):
        response.headers[CORRELATOR] = correlator
    return response


def _refused(refusal: Refusal) -> Response:
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(max(1, ceil(refusal.retry_after_s)))
    if refusal.cause == "UNAUTHENTICATED":
        headers["www-authenticate"] = 'Bearer realm="ai-paging"'
    return camara_error(*ERRORS.get(refusal.cause, UNAVAILABLE), str(refusal), headers)


def _invalid(error: RequestValidationError) -> Response:
    """Say what is wrong, quoting no value of the request."""
    found = error.errors()
    code = "OUT_OF_RANGE" if {item["type"] for item in found} <= _OF_RANGE else "INVALID_ARGUMENT"
    what = [f"{'.'.join(str(p)[:64] for p in item['loc'])}: {item['msg']}" for item in found[:10]]
    return camara_error(400, code, "; ".join(what))


def device_of(
    caller: Caller, plane: ControlPlane, device: Device | None
) -> tuple[str, dict[str, Any] | None]:
    """Return the UE that a request is about, and the one identifier that said so.

    A UE that calls for itself is its own identification (as with a three-legged access token).
    Of several identifiers one that we have is used; whether the others agree is not checked
    (Commonalities, DeviceResponse). Raises Refusal.
    """
    if caller.ue is not None:
        if device is not None:
            raise Refusal("UNNECESSARY_IDENTIFIER", "The device is already identified.")
        return caller.ue, None
    if caller.anchor is not None:
        raise Refusal("NOT_ALLOWED", "an anchor has no sessions")
    if device is None:
        raise Refusal("MISSING_IDENTIFIER", "The device cannot be identified.")
    if device.ipv4_address is not None:
        address = device.ipv4_address
        known = {"ipv4Address": address.model_dump(by_alias=True, exclude_none=True)}
        for text in (address.private_address, address.public_address):
            ue = None if text is None else plane.ue_by_address.get(IPv4Address(text))
            if ue is not None:
                return ue, known
    if device.ipv6_address is not None:
        ue = plane.ue_by_address.get(IPv6Address(device.ipv6_address))
        if ue is not None:
            return ue, {"ipv6Address": device.ipv6_address}
    if device.ipv4_address is None and device.ipv6_address is None:
        raise Refusal("UNSUPPORTED_IDENTIFIER", "The identifier provided is not supported.")
    raise Refusal("UE_UNKNOWN", "Device identifier not found.")
