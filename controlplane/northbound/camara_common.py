"""What CAMARA's APIs share (Commonalities r4.3): errors, correlator, devices, strict requests.

`CamaraRoute` turns whatever goes wrong under a CAMARA path into CAMARA's own form of error, and
returns each request's `x-correlator`.
"""

import re
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from math import ceil
from typing import Annotated, Any, Self

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError
from controlplane.northbound.identity import Caller
from controlplane.northbound.plane import ControlPlane
from controlplane.sinks import SinkError
from controlplane.store import StoreError

CORRELATOR = "x-correlator"
_CORRELATOR = re.compile(r"[a-zA-Z0-9-_:;./<>{}]{0,256}")

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
    "TASK_NOT_ALLOWED": (403, "PERMISSION_DENIED"),
    "LEASE_QUOTA_EXCEEDED": (403, "PERMISSION_DENIED"),
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


def camara_error(status: int, code: str, message: str) -> JSONResponse:
    """Return an ErrorInfo."""
    return JSONResponse({"status": status, "code": code, "message": message[:512]}, status)


class CamaraRoute(APIRoute):
    """A route under a CAMARA path."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, errors and correlator included."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            correlator = request.headers.get(CORRELATOR)
            if correlator is not None and not _CORRELATOR.fullmatch(correlator):
                return camara_error(400, "INVALID_ARGUMENT", f"{CORRELATOR} is malformed")
            try:
                response = await handle(request)
            except Refusal as refusal:
                status, code = ERRORS.get(refusal.cause, UNAVAILABLE)
                response = camara_error(status, code, str(refusal))
                if refusal.retry_after_s is not None:
                    response.headers["retry-after"] = str(max(1, ceil(refusal.retry_after_s)))
            except RequestValidationError as error:
                response = camara_error(400, "INVALID_ARGUMENT", _what(error))
            except (StoreError, EnforcementError):
                response = camara_error(*UNAVAILABLE, "the service is not available now")
            if response.status_code == 401:
                response.headers["www-authenticate"] = 'Bearer realm="ai-paging"'
            if correlator is not None:
                response.headers[CORRELATOR] = correlator
            return response

        return handled


def _what(error: RequestValidationError) -> str:
    """Say what is wrong, quoting nothing of the request's values."""
    found = error.errors()[:10]
    return "; ".join(
        f"{'.'.join(str(p)[:64] for p in item['loc'])}: {item['msg']}" for item in found
    )


class CamaraModel(BaseModel):
    """A request body: unknown properties are 400 INVALID_ARGUMENT at any level."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


Ipv4 = Annotated[IPv4Address, Field(strict=False)]
Ipv6 = Annotated[IPv6Address, Field(strict=False)]
Ipv4Text = Annotated[str, StringConstraints(max_length=15)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _address(kind: type[IPv4Address] | type[IPv6Address], text: str) -> str:
    kind(text)
    return text


class DeviceIpv4Address(CamaraModel):
    """The address as the application server sees it, and how to tell devices behind it apart."""

    public_address: Ipv4Text
    private_address: Ipv4Text | None = None
    public_port: Port | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        _address(IPv4Address, self.public_address)
        if self.private_address is not None:
            _address(IPv4Address, self.private_address)
        elif self.public_port is None:
            raise ValueError("publicAddress needs privateAddress or publicPort beside it")
        return self


class Device(CamaraModel):
    """A UE, by one or more identifiers."""

    phone_number: Annotated[str, StringConstraints(pattern=r"^\+[1-9][0-9]{4,14}$")] | None = None
    network_access_identifier: Annotated[str, StringConstraints(max_length=2048)] | None = None
    ipv4_address: DeviceIpv4Address | None = None
    ipv6_address: Annotated[str, StringConstraints(max_length=45)] | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("at least one identifier is needed")
        if self.ipv6_address is not None:
            _address(IPv6Address, self.ipv6_address)
        return self


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


def check_credential(error: SinkError) -> Refusal:
    """Return the refusal for a sink or credential that cannot be used."""
    return Refusal("INVALID" if error.code == "INVALID_ARGUMENT" else error.code, str(error))
