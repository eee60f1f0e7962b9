"""OAuth 2.0 client credentials (RFC 6749, section 4.4) with JWT access tokens (RFC 9068).

Third parties have a client id, a secret and the scopes they may ask for; each client belongs to
one tenant. Tokens are signed by the key ring. No I/O: the HTTP endpoint is elsewhere.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated, Self
from urllib.parse import unquote_plus

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from controlplane.configfile import ConfigModel
from controlplane.intent import Name
from controlplane.keys import KeyRing
from controlplane.verifier import Recent, TokenError, digest, numeric_date, text, verified_payload

TYPE = "at+jwt"  # RFC 9068, section 2.1
GRANT_TYPE = "client_credentials"
LIFETIME_S = 3600
SCOPES = frozenset(
    [
        *("sessions:read", "sessions:write", "anchors:read", "anchors:write"),
        *("models:read", "models:write", "events:read", "evidence:read"),
        # CAMARA quality-on-demand and qos-profiles
        "quality-on-demand:sessions:create",
        "quality-on-demand:sessions:read",
        "quality-on-demand:sessions:update",
        "quality-on-demand:sessions:delete",
        "quality-on-demand:sessions:retrieve-by-device",
        "qos-profiles:read",
    ]
)
_SECRET_BYTES = 32
_SECRET_HASH = re.compile(r"sha256\$([\w-]{22})\$([\w-]{43})", re.ASCII)  # salt, digest


class ErrorCode(StrEnum):
    """Error codes of RFC 6749, section 5.2, and RFC 6750, section 3.1."""

    INVALID_REQUEST = "invalid_request"
    INVALID_CLIENT = "invalid_client"
    UNSUPPORTED_GRANT_TYPE = "unsupported_grant_type"
    INVALID_SCOPE = "invalid_scope"
    INVALID_TOKEN = "invalid_token"
    INSUFFICIENT_SCOPE = "insufficient_scope"


_STATUS = {
    ErrorCode.INVALID_CLIENT: HTTPStatus.UNAUTHORIZED,
    ErrorCode.INVALID_TOKEN: HTTPStatus.UNAUTHORIZED,
    ErrorCode.INSUFFICIENT_SCOPE: HTTPStatus.FORBIDDEN,
}


class OAuthError(Exception):
    """A refusal; the description quotes nothing that the caller sent."""

    def __init__(self, code: ErrorCode, description: str) -> None:
        super().__init__(f"{code}: {description}")
        self.code = code
        self.description = description

    @property
    def status(self) -> HTTPStatus:
        """The HTTP status that goes with the code."""
        return _STATUS.get(self.code, HTTPStatus.BAD_REQUEST)


class Client(ConfigModel):
    """A client as the configuration names it; `secret_hash` comes from `generate_secret`."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )

    client_id: Name
    secret_hash: Annotated[str, Field(repr=False)]
    scopes: tuple[str, ...]

    # On the whole model, so that the complaint does not quote a secret put here by mistake.
    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        if not _SECRET_HASH.fullmatch(self.secret_hash):
            raise ValueError("secret_hash is not sha256$salt$digest: store the hash, no secret")
        if unknown := set(self.scopes) - SCOPES:
            raise ValueError(f"no such scope: {', '.join(sorted(unknown))}")
        return self


def generate_secret() -> tuple[str, str]:
    """Make a client secret; return it, to be shown once, and its hash, to be stored.

    The hash is one salted SHA-256: a secret of 256 random bits cannot be guessed however fast the
    hash, so a slow one (scrypt) would only let strangers load the token endpoint.
    """
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    salt = secrets.token_urlsafe(16)
    return secret, f"sha256${salt}${_digest(salt, secret)}"


def _digest(salt: str, secret: str) -> str:
    hashed = hashlib.sha256(f"{salt}{secret}".encode(errors="replace")).digest()
    return base64.urlsafe_b64encode(hashed).rstrip(b"=").decode("ascii")


def basic_credentials(authorization: str) -> tuple[str, str]:
    """Return client id and secret from an HTTP Basic header (RFC 6749, section 2.3.1).

    OAuthError if it is anything else.
    """
    scheme, _, encoded = authorization.strip().partition(" ")
    try:
        if scheme.lower() != "basic":
            raise ValueError(scheme)
        pair = base64.b64decode(encoded.strip(), validate=True).decode()
        client_id, colon, secret = pair.partition(":")
        if not colon:
            raise ValueError(pair)
    except (ValueError, binascii.Error):
        raise OAuthError(ErrorCode.INVALID_CLIENT, "not HTTP Basic credentials") from None
    return unquote_plus(client_id), unquote_plus(secret)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, on whose behalf, and what for."""

    tenant: str
    client_id: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raise OAuthError if the token is not for `scope`."""
        if scope not in self.scopes:
            raise OAuthError(ErrorCode.INSUFFICIENT_SCOPE, f"this needs the scope {scope}")


@dataclass(frozen=True, slots=True)
class _Registered:
    tenant: str
    salt: str
    digest: str
    scopes: frozenset[str]


# Who is not registered is compared with this, at the same cost, and never equals it.
_NOBODY = _Registered("", secrets.token_urlsafe(16), "", frozenset())


class Clients:
    """The registered clients of all tenants."""

    def __init__(self, by_tenant: Iterable[tuple[str, Client]]) -> None:
        """`by_tenant`: tenant's name and client. ValueError if a client id is given twice."""
        self._registered: dict[str, _Registered] = {}
        for tenant, client in by_tenant:
            if client.client_id in self._registered:
                raise ValueError(f"client {client.client_id} is given twice")
            _, salt, hashed = client.secret_hash.split("$")
            registered = _Registered(tenant, salt, hashed, frozenset(client.scopes))
            self._registered[client.client_id] = registered

    def principal(self, client_id: str, scopes: frozenset[str]) -> Principal | None:
        """Return a client with what it may still have of `scopes`; None if it is not registered."""
        found = self._registered.get(client_id)
        return Principal(found.tenant, client_id, scopes & found.scopes) if found else None

    def allowed(self, client_id: str, secret: str) -> frozenset[str]:
        """Return the scopes of a client that knows its secret, or raise OAuthError."""
        found = self._registered.get(client_id, _NOBODY)
        if not hmac.compare_digest(_digest(found.salt, secret), found.digest):
            raise OAuthError(ErrorCode.INVALID_CLIENT, "no such client, or not its secret")
        return found.scopes


@dataclass(frozen=True, slots=True)
class _Verified:
    client_id: str
    scopes: frozenset[str]
    expires_unix_s: float


class TokenService:
    """Grants access tokens and says who presents one."""

    def __init__(
        self,
        ring: KeyRing,
        clients: Clients,
        *,
        issuer: str,
        audience: str,
        lifetime_s: int = LIFETIME_S,
    ) -> None:
        """`audience`: the API's identifier. ValueError if keys are pruned before tokens end."""
        if lifetime_s > ring.retain_s:
            raise ValueError(f"tokens of {lifetime_s} s outlive keys kept for {ring.retain_s} s")
        self._ring = ring
        self._clients = clients
        self._issuer = issuer
        self._audience = audience
        self._lifetime_s = lifetime_s
        self._recent: Recent[_Verified] = Recent()

    def grant(
        self,
        client_id: str,
        secret: str,
        scope: str | None,
        now_unix_s: float,
        *,
        grant_type: str = GRANT_TYPE,
    ) -> dict[str, object]:
        """Return the answer of RFC 6749, section 5.1, or raise OAuthError.

        `scope`: what is asked for, separated by spaces; None or empty: all the client may have.
        """
        allowed = self._clients.allowed(client_id, secret)
        if grant_type != GRANT_TYPE:
            raise OAuthError(ErrorCode.UNSUPPORTED_GRANT_TYPE, f"only {GRANT_TYPE} is granted")
        asked = frozenset(scope.split(" ")) if scope else allowed
        if not asked <= allowed:
            raise OAuthError(ErrorCode.INVALID_SCOPE, "not a scope that this client may have")
        granted = " ".join(sorted(asked))
        issued_unix_s = int(now_unix_s)
        token = self._ring.signing.sign(
            TYPE,
            {
                "iss": self._issuer,
                "sub": client_id,  # the client acts for itself (RFC 9068, section 2.2)
                "client_id": client_id,
                "aud": self._audience,
                "iat": issued_unix_s,
                "exp": issued_unix_s + self._lifetime_s,
                "jti": secrets.token_hex(16),
                "scope": granted,
            },
        )
        return {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": self._lifetime_s,
            "scope": granted,
        }

    def authenticate(self, bearer: str, now_unix_s: float) -> Principal:
        """Return who presents a token, or raise OAuthError, whatever was presented."""
        try:
            verified = self._verified(bearer)
        except TokenError as error:
            raise OAuthError(ErrorCode.INVALID_TOKEN, str(error)) from None
        if verified.expires_unix_s <= now_unix_s:
            raise OAuthError(ErrorCode.INVALID_TOKEN, "token refused: expired")
        principal = self._clients.principal(verified.client_id, verified.scopes)
        if principal is None:
            raise OAuthError(ErrorCode.INVALID_TOKEN, "token refused: the client is gone")
        return principal

    def _verified(self, bearer: str) -> _Verified:
        name = digest(bearer)
        verified = self._recent.get(name)
        if verified is None:
            claims = verified_payload(bearer, self._ring.public_keys(), TYPE)
            verified = self._checked(claims)
            self._recent.put(name, verified)
        return verified

    def _checked(self, claims: Mapping[str, object]) -> _Verified:
        if claims.get("iss") != self._issuer or claims.get("aud") != self._audience:
            raise OAuthError(ErrorCode.INVALID_TOKEN, "token refused: not for this API")
        scopes = claims.get("scope")
        return _Verified(
            client_id=text(claims, "client_id"),
            scopes=frozenset(scopes.split()) if isinstance(scopes, str) else frozenset(),
            expires_unix_s=numeric_date(claims, "exp"),
        )
