"""Sinks of notices, as a client names them: which are accepted, and the credentials for them.

CAMARA Commonalities, SinkCredential. A credential is a secret: it is in no `repr` and no error.
"""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

import httpx
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.alias_generators import to_camel

MAX_URI_CHARS = 2048
BEARER_TOKEN = r"^[A-Za-z0-9\-._~+/]+=*$"  # RFC 6750, 2.1: b64token
# RFC 3986 with an authority; without user information or a fragment
_HTTP_URI = re.compile(
    r"(?P<scheme>https?)://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    r"(?:[/?](?:[A-Za-z0-9._~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*)?"
)
_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


class SinkError(ValueError):
    """A sink or credential that cannot be used; `code` is CAMARA's."""

    def __init__(self, code: str, why: str) -> None:
        self.code = code
        super().__init__(why)


def _rfc3339(value: Any) -> Any:
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC3339.fullmatch(value)):
        return value
    raise ValueError("must be an RFC 3339 time with a time zone")


class _Credential(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, hide_input_in_errors=True
    )


class AccessTokenCredential(_Credential):
    """A bearer token (RFC 6750), given with the sink."""

    credential_type: Literal["ACCESSTOKEN"]
    access_token: str = Field(max_length=4096, pattern=BEARER_TOKEN, repr=False)
    access_token_expires_utc: Annotated[AwareDatetime, BeforeValidator(_rfc3339)]
    access_token_type: Literal["bearer"]


class PrivateKeyJWTCredential(_Credential):
    """Where to get a bearer token, for a client assertion (RFC 7523) signed with our key."""

    credential_type: Literal["PRIVATE_KEY_JWT"]
    client_id: str | None = Field(default=None, max_length=128, repr=False)
    token_uri: str | None = Field(default=None, max_length=MAX_URI_CHARS, repr=False)


SinkCredential = Annotated[
    AccessTokenCredential | PrivateKeyJWTCredential, Field(discriminator="credential_type")
]
_CODE_OF_MEMBER = {"credentialType": "INVALID_CREDENTIAL", "accessTokenType": "INVALID_TOKEN"}
_CREDENTIAL: TypeAdapter[SinkCredential] = TypeAdapter(SinkCredential)


def read_credential(text: str) -> SinkCredential:
    """Read the JSON of a credential. Raises SinkError."""
    try:
        return _CREDENTIAL.validate_json(text)
    except ValidationError as error:  # quotes the credential
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    member = str(first["loc"][-1]) if first["loc"] else "credentialType"
    code = _CODE_OF_MEMBER.get(member, "INVALID_ARGUMENT")
    raise SinkError(code, f"sinkCredential, {member}: {first['msg']}")


def check_sink(uri: str, credential: SinkCredential | None, *, allow_http: bool) -> None:
    """Raise SinkError if notices cannot or must not go there.

    CAMARA asks for https; `allow_http` is for testbeds.
    """
    _check_uri(uri, "INVALID_SINK", allow_http)
    if isinstance(credential, PrivateKeyJWTCredential):
        if credential.client_id is None or credential.token_uri is None:
            raise SinkError(
                "PRIVATE_KEY_JWT_NOT_CONFIGURED",
                "PRIVATE_KEY_JWT needs clientId and tokenUri; none were agreed on before",
            )
        _check_uri(credential.token_uri, "INVALID_CREDENTIAL", allow_http)


def _check_uri(uri: str, code: str, allow_http: bool) -> None:
    match = _HTTP_URI.fullmatch(uri)
    if match is None or len(uri) > MAX_URI_CHARS:
        raise SinkError(
            code,
            f"not an https URI of at most {MAX_URI_CHARS} characters, "
            "without user information and fragment",
        )
    if match["scheme"] != "https" and not allow_http:
        raise SinkError(code, "must be an https URI")
    try:
        port = httpx.URL(uri).port
    except (httpx.InvalidURL, ValueError) as error:
        raise SinkError(code, f"not a URI that can be reached: {error}") from None
    if port is not None and not 0 < port < 2**16:
        raise SinkError(code, f"there is no port {port}")
