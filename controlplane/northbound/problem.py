"""Errors as RFC 9457 problem details, with a 3GPP-style `cause` (TS 29.571, ProblemDetails)."""

import logging
from dataclasses import asdict
from http import HTTPStatus
from math import ceil
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError
from controlplane.store import StoreError

log = logging.getLogger(__name__)
PROBLEM_JSON = "application/problem+json"
STATUS_OF_CAUSE = {
    "MALFORMED": HTTPStatus.BAD_REQUEST,
    "INVALID": HTTPStatus.BAD_REQUEST,
    "TOO_LARGE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "UNSUPPORTED_MEDIA_TYPE": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "UNAUTHENTICATED": HTTPStatus.UNAUTHORIZED,
    "UE_UNKNOWN": HTTPStatus.FORBIDDEN,
    "NOT_ALLOWED": HTTPStatus.FORBIDDEN,
    "TASK_NOT_ALLOWED": HTTPStatus.FORBIDDEN,
    "QOS_PROFILE_NOT_ALLOWED": HTTPStatus.FORBIDDEN,
    "LEASE_QUOTA_EXCEEDED": HTTPStatus.FORBIDDEN,
    "ANCHOR_OWNED": HTTPStatus.FORBIDDEN,
    "NO_SUCH_RESOURCE": HTTPStatus.NOT_FOUND,
    "NO_SUCH_ENTRY": HTTPStatus.NOT_FOUND,
    "METHOD_NOT_ALLOWED": HTTPStatus.METHOD_NOT_ALLOWED,
    "SESSION_UNKNOWN": HTTPStatus.NOT_FOUND,
    "TENANT_UNKNOWN": HTTPStatus.NOT_FOUND,
    "ANCHOR_UNKNOWN": HTTPStatus.NOT_FOUND,
    "ATTACHMENT_POINT_UNKNOWN": HTTPStatus.NOT_FOUND,
    "CELL_UNKNOWN": HTTPStatus.NOT_FOUND,
    "TASK_UNKNOWN": HTTPStatus.NOT_FOUND,
    "QOS_PROFILE_UNKNOWN": HTTPStatus.NOT_FOUND,
    "QOS_PROFILE_INACTIVE": HTTPStatus.CONFLICT,
    "DURATION_OUT_OF_RANGE": HTTPStatus.UNPROCESSABLE_ENTITY,
    "KEY_REUSED": HTTPStatus.UNPROCESSABLE_ENTITY,
    "NOT_ANCHORED": HTTPStatus.CONFLICT,
    "SESSION_EXISTS": HTTPStatus.CONFLICT,
    "SESSION_ENDED": HTTPStatus.CONFLICT,
    "NOT_EXTENDED": HTTPStatus.CONFLICT,
    "ALREADY_THERE": HTTPStatus.CONFLICT,
    "NO_BETTER_ANCHOR": HTTPStatus.CONFLICT,
    "RATE_LIMITED": HTTPStatus.TOO_MANY_REQUESTS,
    "SESSION_QUOTA_EXCEEDED": HTTPStatus.TOO_MANY_REQUESTS,
    "BANDWIDTH_QUOTA_EXCEEDED": HTTPStatus.TOO_MANY_REQUESTS,
    "NO_CANDIDATE": HTTPStatus.SERVICE_UNAVAILABLE,
    "NO_BANDWIDTH": HTTPStatus.SERVICE_UNAVAILABLE,
    "ANCHOR_NOT_READY": HTTPStatus.SERVICE_UNAVAILABLE,
    "PREPARE_TIMED_OUT": HTTPStatus.SERVICE_UNAVAILABLE,
    "ENFORCEMENT_FAILED": HTTPStatus.SERVICE_UNAVAILABLE,
    "STORE_FAILED": HTTPStatus.SERVICE_UNAVAILABLE,
}


def problem(
    cause: str, detail: str, headers: dict[str, str] | None = None, **members: Any
) -> JSONResponse:
    """Build the response for a cause of `STATUS_OF_CAUSE`."""
    status = STATUS_OF_CAUSE[cause]
    return JSONResponse(
        {
            "title": status.phrase,
            "status": int(status),
            "cause": cause,
            "detail": detail,
            **members,
        },
        status_code=status,
        media_type=PROBLEM_JSON,
        headers=headers,
    )


def refused(refusal: Refusal) -> JSONResponse:
    """Build the response for a refusal."""
    members: dict[str, Any] = {}
    if refusal.excluded:
        members["excluded"] = [asdict(exclusion) for exclusion in refusal.excluded]
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(max(1, ceil(refusal.retry_after_s)))
    if refusal.cause == "UNAUTHENTICATED":
        headers["www-authenticate"] = 'Bearer realm="ai-paging"'
    return problem(refusal.cause, str(refusal), headers, **members)


def of_error(error: Exception) -> JSONResponse:
    """Build the response for what a transaction may raise. Others are raised again."""
    match error:
        case Refusal():
            return refused(error)
        case StoreError():
            log.error("%s", error)
            return problem("STORE_FAILED", "the evidence log cannot be used")
        case EnforcementError():
            log.error("%s", error)
            return problem("ENFORCEMENT_FAILED", str(error))
        case _:
            raise error


class Problem(BaseModel):
    """RFC 9457, with TS 29.571's `cause`."""

    title: str
    status: int
    cause: str
    detail: str


def responses(*statuses: int, created: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Describe what an operation may answer with, for the OpenAPI document.

    `statuses`: of problems. `created`: what 201 means.
    """
    described: dict[int | str, dict[str, Any]] = {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }
    if created is not None:
        described[201] = {"description": created}
        described[200] = {"description": "It had been granted before, under the same key"}
    return described
