"""The bearer tokens (RFC 6750) that authorise us at sinks.

An access token comes with the sink. With PRIVATE_KEY_JWT we ask the client's authorization server
for one, by client credentials and a JWT assertion (RFC 6749, 4.4; RFC 7523, 2.2), and keep it until
it expires.
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

import httpx
from pydantic import BaseModel, Field, ValidationError

from controlplane.sink_http import exchange
from controlplane.sinks import (
    BEARER_TOKEN,
    AccessTokenCredential,
    PrivateKeyJWTCredential,
    SinkCredential,
)

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_LIFE_S = 60
MAX_KEPT = 1_000  # tokens
NS_PER_S = 1_000_000_000


class TokenExpired(Exception):
    """The token that came with the sink has expired: nothing can be sent there any more."""


class TokenUnavailable(Exception):
    """The authorization server gave no token; it may later."""


class AssertionKey(Protocol):
    """A key of our JWKS."""

    def sign(self, typ: str, claims: Mapping[str, object]) -> str:
        """Return the JWT."""


class _Granted(BaseModel):
    """RFC 6749, 5.1."""

    access_token: str = Field(max_length=4096, pattern=BEARER_TOKEN)
    token_type: str = Field(pattern="^[Bb][Ee][Aa][Rr][Ee][Rr]$")
    expires_in: int = Field(default=0, ge=0, le=10**9)  # 0: unknown, do not keep it


class SinkTokens:
    """Finds the token for a credential."""

    def __init__(self, client: httpx.AsyncClient, key: Callable[[], AssertionKey]) -> None:
        """`key` returns the key to sign with now."""
        self._client = client
        self._key = key
        self._kept: dict[SinkCredential, tuple[str, int]] = {}  # token, expiry in Unix ns

    async def token(self, credential: SinkCredential, now_unix_ns: int) -> str:
        """Return a token that is valid now.

        Raises TokenExpired, TokenUnavailable, httpx.HTTPError.
        """
        if isinstance(credential, AccessTokenCredential):
            if credential.access_token_expires_utc.timestamp() * NS_PER_S <= now_unix_ns:
                raise TokenExpired
            return credential.access_token
        token, expires_unix_ns = self._kept.get(credential, ("", 0))
        if expires_unix_ns <= now_unix_ns:
            granted = await self._ask(credential, now_unix_ns // NS_PER_S)
            token = granted.access_token
            while len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[credential] = token, now_unix_ns + granted.expires_in * NS_PER_S
        return token

    def forget(self, credential: SinkCredential) -> None:
        """Drop the token that is kept for a credential: a sink has refused it."""
        self._kept.pop(credential, None)

    async def _ask(self, credential: PrivateKeyJWTCredential, now_unix_s: int) -> _Granted:
        assert credential.client_id is not None and credential.token_uri is not None  # see sinks
        assertion = self._key().sign(
            "JWT",
            {
                "iss": credential.client_id,
                "sub": credential.client_id,
                "aud": credential.token_uri,
                "iat": now_unix_s,
                "exp": now_unix_s + ASSERTION_LIFE_S,
                "jti": secrets.token_urlsafe(16),
            },
        )
        request = self._client.build_request(
            "POST",
            credential.token_uri,
            data={
                "grant_type": "client_credentials",
                "client_id": credential.client_id,
                "client_assertion_type": ASSERTION_TYPE,
                "client_assertion": assertion,
            },
            headers={"accept": "application/json"},
        )
        answer = await exchange(self._client, request)
        if answer.status != httpx.codes.OK:
            raise TokenUnavailable(f"token endpoint: HTTP {answer.status}")
        try:
            return _Granted.model_validate_json(answer.body)
        except ValidationError:  # quotes the token
            raise TokenUnavailable("token endpoint: not the answer of RFC 6749, 5.1") from None
