"""What an anchor needs to check AISTs: this one file, PyJWT and cryptography.

    verifier = Verifier("ai-paging", jwks)
    claims = verifier.check(token, aisi, source_address)  # or TokenError, with its reason
    verifier.update(revocations=answer["revocations"])    # from each heartbeat's answer

`Reason.UNKNOWN_KEY` says that the issuer may have rotated its keys: fetch the JWKS and `update`,
but not more often than once in some seconds, since anyone can make up a key's name. Nothing here
does I/O. Not for several threads at once.
"""

import hashlib
import heapq
import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Generic, TypeVar

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

AIST_TYPE = "aist+jwt"  # header `typ` (RFC 8725, section 3.11)
ALGORITHM = "EdDSA"
MAX_TOKEN_BYTES = 8192
CACHED_TOKENS = 4096
NOT_BEFORE_LEEWAY_S = 1.0  # the anchor's clock may be late; for `exp` there is no leeway
_COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)  # RFC 7515, section 7.1
_MAX_INTEGER = (1 << 53) - 1  # RFC 8259, section 6
_JWS = jwt.PyJWS(algorithms=[ALGORITHM])

Address = IPv4Address | IPv6Address
Value = TypeVar("Value")


class Reason(StrEnum):
    """Why a token is refused."""

    MALFORMED = "malformed"  # not a token of this kind, or a claim missing or of the wrong type
    ALGORITHM = "algorithm"
    TYPE = "type"
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    ISSUER = "issuer"
    NOT_YET_VALID = "not_yet_valid"
    EXPIRED = "expired"
    REVOKED = "revoked"  # its session has ended, or has left this anchor
    AUDIENCE = "audience"  # it is for another AISI
    SOURCE = "source"  # it was sent from an address of somebody else
    SCOPE = "scope"  # it is for another task


class TokenError(Exception):
    """A token that must not be honoured; the message says why, without quoting the token."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"token refused: {message}")
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a verified AIST says."""

    token_id: str
    ue: str  # UE identity, `sub`
    addresses: tuple[Address, ...]  # from which the bearer may come
    aisi: str  # `aud`
    lease_id: str
    epoch: int
    task: str  # `scope`: the pipeline tag the bearer may use
    not_before_unix_s: float
    expires_unix_s: float


def public_keys(jwks: Mapping[str, object]) -> dict[str, Ed25519PublicKey]:
    """Return the Ed25519 keys of a JWKS by `kid`. ValueError if it is no JWKS.

    Other and malformed keys in it are passed over (RFC 7517, section 5).
    """
    entries = jwks.get("keys") if isinstance(jwks, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError("not a JWKS: no list of keys")
    found = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(kid := entry.get("kid"), str):
            try:
                key = jwt.PyJWK(entry, ALGORITHM).key
            except (jwt.PyJWTError, ValueError, TypeError):
                continue
            if entry.get("kty") == "OKP" and isinstance(key, Ed25519PublicKey):
                found[kid] = key
    return found


def verified_payload(
    token: str, keys: Mapping[str, Ed25519PublicKey], typ: str
) -> dict[str, object]:
    """Return a JWT's payload if it has this `typ` and a signature by one of `keys`.

    TokenError otherwise. No claim is looked at.
    """
    if not isinstance(token, str) or len(token) > MAX_TOKEN_BYTES or not _COMPACT.fullmatch(token):
        raise TokenError(Reason.MALFORMED, "not a compact JWS of at most 8 KiB")
    try:
        header = jwt.get_unverified_header(token)
        if header.get("alg") != ALGORITHM:
            raise TokenError(Reason.ALGORITHM, f"alg is not {ALGORITHM}")
        if header.get("typ") != typ:
            raise TokenError(Reason.TYPE, f"typ is not {typ}")
        if "crit" in header:  # RFC 7515, section 4.1.11: none is understood here
            raise TokenError(Reason.MALFORMED, "needs an extension")
        key = keys.get(header.get("kid", ""))
        if key is None:
            raise TokenError(Reason.UNKNOWN_KEY, "signed with a key that is not known")
        payload = json.loads(_JWS.decode(token, key, algorithms=[ALGORITHM]))
    except jwt.InvalidSignatureError:
        raise TokenError(Reason.SIGNATURE, "the signature is not right") from None
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenError(Reason.MALFORMED, "not a signed JSON object") from None
    if not isinstance(payload, dict):
        raise TokenError(Reason.MALFORMED, "the payload is not an object")
    return payload


def text(claims: Mapping[str, object], name: str) -> str:
    """Return a claim that must be a non-empty string, or raise TokenError."""
    value = claims.get(name)
    if not isinstance(value, str) or not value:
        raise TokenError(Reason.MALFORMED, f"{name} is not a string")
    return value


def numeric_date(claims: Mapping[str, object], name: str) -> float:
    """Return a claim that must be a time (RFC 7519, section 2), Unix s, or raise TokenError."""
    value = claims.get(name)
    # `type`: True is an int by isinstance; the bounds also refuse NaN.
    if type(value) not in (int, float) or not 0 <= value <= _MAX_INTEGER:  # type: ignore[operator]
        raise TokenError(Reason.MALFORMED, f"{name} is not a time")
    return value  # type: ignore[return-value]


class Recent(Generic[Value]):
    """What the tokens last found good say, so that a signature is checked once (130 us)."""

    def __init__(self, size: int = CACHED_TOKENS) -> None:
        self._size = size
        self._values: OrderedDict[bytes, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, digest: bytes) -> Value | None:
        """Return what is kept under a token's digest."""
        value = self._values.get(digest)
        if value is not None:
            self._values.move_to_end(digest)
        return value

    def put(self, digest: bytes, value: Value) -> None:
        """Keep a value, in place of the one not used for longest."""
        self._values[digest] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()


def digest(token: str) -> bytes:
    """Return the name under which a token is kept: a digest, so that no token stays in memory."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


_Session = tuple[str, str]  # `sub` and `aud`: a UE has one session with a service at a time


@dataclass(frozen=True, slots=True)
class _Revoked:
    """Tokens with an epoch below `floor` are void, and from `then_unix_s` on those below `then`."""

    floor: int
    then: int
    then_unix_s: float
    exp: float

    def at(self, now_unix_s: float) -> int:
        return self.then if now_unix_s >= self.then_unix_s else self.floor


class _Revocations:
    """What was revoked, each until the last token that it concerns has expired by itself."""

    def __init__(self) -> None:
        self._held: dict[_Session, _Revoked] = {}
        self._ends: list[tuple[float, _Session]] = []  # heap

    def __len__(self) -> int:
        return len(self._held)

    def add(self, session: _Session, epoch: int, nbf: float, exp: float, now: float) -> None:
        held = self._held.get(session, _Revoked(0, 0, 0, -1.0))
        self._held[session] = _Revoked(held.at(now), epoch, nbf, max(exp, held.exp))
        if exp > held.exp:  # heartbeats may repeat themselves
            heapq.heappush(self._ends, (exp, session))

    def forget(self, now_unix_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_unix_s:
            _, session = heapq.heappop(self._ends)
            if session in self._held and self._held[session].exp <= now_unix_s:
                del self._held[session]

    def check(self, claims: Claims, now_unix_s: float) -> None:
        held = self._held.get((claims.ue, claims.aisi))
        if held is not None and claims.epoch < held.at(now_unix_s):
            raise TokenError(Reason.REVOKED, "its session has ended, or is not here any more")


class Verifier:
    """Checks AISTs of one issuer."""

    def __init__(self, issuer: str, jwks: Mapping[str, object]) -> None:
        """`jwks`: the issuer's public keys (RFC 7517). ValueError if it is no JWKS."""
        self._issuer = issuer
        self._keys = public_keys(jwks)
        self._recent: Recent[Claims] = Recent()
        self._revocations = _Revocations()

    def check(
        self,
        token: str,
        aisi: str | frozenset[str],
        source_address: str | Address,
        task: str | None = None,
        now_unix_s: float | None = None,
    ) -> Claims:
        """Return what a token says, or raise TokenError, whatever it was given.

        `aisi`: the AISI asked for, or those that are served here, of which the token's is one.
        `source_address`: where the request came from. `task`: what it wants done, if that is to be
        checked. `now_unix_s`: the system's time if not given.
        """
        now = time.time() if now_unix_s is None else now_unix_s
        claims = self._verified(token)
        if claims.not_before_unix_s > now + NOT_BEFORE_LEEWAY_S:
            raise TokenError(Reason.NOT_YET_VALID, "not valid yet")
        if claims.expires_unix_s <= now:
            raise TokenError(Reason.EXPIRED, "expired")
        self._revocations.check(claims, now)
        if claims.aisi not in ((aisi,) if isinstance(aisi, str) else aisi):
            raise TokenError(Reason.AUDIENCE, "for another service")
        if _address(source_address) not in claims.addresses:
            raise TokenError(Reason.SOURCE, "not for this source address")
        if task is not None and claims.task != task:
            raise TokenError(Reason.SCOPE, "for another task")
        return claims

    def update(
        self,
        *,
        jwks: Mapping[str, object] | None = None,
        revocations: Iterable[Mapping[str, object]] = (),
        now_unix_s: float | None = None,
    ) -> None:
        """Take in what the issuer says. ValueError, and no change, if it cannot be understood.

        `jwks` replaces the keys. A revocation is `{"sub", "aud", "epoch", "exp"}`: of this UE's
        tokens for this AISI, those of a smaller epoch are void; with `nbf` (Unix s): from then on.
        The latest for a UE and an AISI counts. It is forgotten at `exp` (Unix s), when the last
        token that it concerns will have expired.
        """
        now = time.time() if now_unix_s is None else now_unix_s
        try:
            added = [_revocation(revocation) for revocation in revocations]
        except TokenError as error:
            raise ValueError(f"not a revocation: {error}") from None
        if jwks is not None:
            self._keys = public_keys(jwks)
            self._recent.clear()
        for session, epoch, nbf, exp in added:
            self._revocations.add(session, epoch, nbf, exp, now)
        self._revocations.forget(now)

    def _verified(self, token: str) -> Claims:
        name = digest(token) if isinstance(token, str) else b""
        claims = self._recent.get(name)
        if claims is None:
            claims = self._claims(verified_payload(token, self._keys, AIST_TYPE))
            self._recent.put(name, claims)
        return claims

    def _claims(self, payload: Mapping[str, object]) -> Claims:
        if text(payload, "iss") != self._issuer:
            raise TokenError(Reason.ISSUER, "from another issuer")
        addresses = payload.get("addresses")
        if not isinstance(addresses, list):
            raise TokenError(Reason.MALFORMED, "addresses is not a list")
        claims = Claims(
            token_id=text(payload, "jti"),
            ue=text(payload, "sub"),
            addresses=tuple(found for found in map(_address, addresses) if found is not None),
            aisi=text(payload, "aud"),
            lease_id=text(payload, "lease"),
            epoch=_epoch(payload),
            task=text(payload, "scope"),
            not_before_unix_s=numeric_date(payload, "nbf"),
            expires_unix_s=numeric_date(payload, "exp"),
        )
        if text(payload, "aisi") != claims.aisi:
            raise TokenError(Reason.MALFORMED, "aisi and aud differ")
        return claims


def _epoch(claims: Mapping[str, object]) -> int:
    value = claims.get("epoch")
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise TokenError(Reason.MALFORMED, "epoch is not a whole number")
    return value


def _revocation(entry: Mapping[str, object]) -> tuple[_Session, int, float, float]:
    if not isinstance(entry, Mapping):
        raise TokenError(Reason.MALFORMED, "not an object")
    nbf = numeric_date(entry, "nbf") if "nbf" in entry else 0
    session = text(entry, "sub"), text(entry, "aud")
    return session, _epoch(entry), nbf, numeric_date(entry, "exp")


def _address(address: object) -> Address | None:
    if not isinstance(address, str | IPv4Address | IPv6Address):  # a number is an address too
        return None
    try:
        found = ip_address(address)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found  # an IPv6 socket names an IPv4 peer ::ffff:a.b.c.d
