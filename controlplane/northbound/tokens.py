"""The OAuth 2 token endpoint: client credentials for third parties (RFC 6749, section 4.4)."""

from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from controlplane.access_tokens import ErrorCode, OAuthError, basic_credentials
from controlplane.northbound.identity import Plane

FORM = "application/x-www-form-urlencoded"
NO_STORE = {"cache-control": "no-store"}

router = APIRouter(prefix="/oauth2", tags=["tokens"])


@router.post(
    "/token",
    summary="Get an access token",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                FORM: {
                    "schema": {
                        "type": "object",
                        "required": ["grant_type"],
                        "properties": {
                            "grant_type": {"type": "string", "const": "client_credentials"},
                            "scope": {"type": "string", "maxLength": 2048},
                            "client_id": {"type": "string", "maxLength": 256},
                            "client_secret": {"type": "string", "maxLength": 256},
                        },
                    }
                }
            },
        }
    },
    responses={
        400: {"description": "An error of RFC 6749, section 5.2"},
        401: {"description": "No such client, or not its secret"},
    },
)
async def token(request: Request, plane: Plane) -> Response:
    """Grant an access token. The client names itself by HTTP Basic, or in the form."""
    try:
        form = await _form(request)
        if "authorization" in request.headers:
            client_id, secret = basic_credentials(request.headers["authorization"])
        else:
            client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
        answer = plane.tokens.grant(
            client_id,
            secret,
            form.get("scope"),
            plane.unix_s(),
            grant_type=form.get("grant_type", ""),
        )
    except OAuthError as error:
        plane.metrics.token_refused(error.code)
        headers = dict(NO_STORE)
        if error.status == 401:
            headers["www-authenticate"] = 'Basic realm="ai-paging"'
        body = {"error": error.code.value, "error_description": str(error)}
        return JSONResponse(body, error.status, headers)
    return JSONResponse(answer, headers=NO_STORE)


async def _form(request: Request) -> dict[str, str]:
    """Read the parameters. Raises OAuthError."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != FORM:
        raise OAuthError(ErrorCode.INVALID_REQUEST, f"the body is {FORM}")
    try:
        pairs = parse_qsl((await request.body()).decode("ascii"), max_num_fields=16)
    except ValueError:
        raise OAuthError(ErrorCode.INVALID_REQUEST, "the body cannot be read") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthError(ErrorCode.INVALID_REQUEST, "a parameter is given twice")
    return form
