"""Errors as RFC 9457 problem details, with a 3GPP-style `cause` (TS 29.571, ProblemDetails)."""

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

STATUS_OF_CAUSE = {
    "MALFORMED": HTTPStatus.BAD_REQUEST,
    "INVALID": HTTPStatus.BAD_REQUEST,
    "TOO_LARGE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "UE_UNKNOWN": HTTPStatus.FORBIDDEN,
    "NOT_YOUR_SESSION": HTTPStatus.FORBIDDEN,
    "NOT_ALLOWED": HTTPStatus.FORBIDDEN,
    "NO_SUCH_RESOURCE": HTTPStatus.NOT_FOUND,
    "NO_SUCH_ENTRY": HTTPStatus.NOT_FOUND,
    "METHOD_NOT_ALLOWED": HTTPStatus.METHOD_NOT_ALLOWED,
    "SESSION_UNKNOWN": HTTPStatus.NOT_FOUND,
    "TASK_UNKNOWN": HTTPStatus.NOT_FOUND,
    "QOS_PROFILE_UNKNOWN": HTTPStatus.NOT_FOUND,
    "SESSION_EXISTS": HTTPStatus.CONFLICT,
    "SESSION_ENDED": HTTPStatus.CONFLICT,
    "NOT_RENEWED": HTTPStatus.CONFLICT,
    "ALREADY_THERE": HTTPStatus.CONFLICT,
    "BUSY": HTTPStatus.CONFLICT,
    "NO_CANDIDATE": HTTPStatus.SERVICE_UNAVAILABLE,
    "ANCHOR_NOT_READY": HTTPStatus.SERVICE_UNAVAILABLE,
    "PREPARE_TIMED_OUT": HTTPStatus.SERVICE_UNAVAILABLE,
    "ENFORCEMENT_FAILED": HTTPStatus.SERVICE_UNAVAILABLE,
    "JOURNAL_FAILED": HTTPStatus.SERVICE_UNAVAILABLE,
}


def problem(cause: str, detail: str, **members: Any) -> JSONResponse:
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
        media_type="application/problem+json",
    )
