"""AIST: the scoped session token, a JWT (RFC 7519) signed with EdDSA over Ed25519 (RFC 8037).

The controller issues, anchors verify with the public key alone. A token is scoped to one UE, one
AISI and one lease, and never outlives that lease.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ISSUER = "ai-paging"
ALGORITHM = "EdDSA"
NS_PER_S = 1_000_000_000
REQUIRED_CLAIMS = [
    *("iss", "sub", "aud", "exp", "nbf", "jti"),
    *("scope", "addresses", "lease", "epoch"),
]


class TokenError(Exception):
    """An AIST that must not be honoured; the message says why, without quoting the token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a verified AIST says."""

    token_id: str
    ue: str  # UE identity, `sub`
    addresses: tuple[str, ...]  # from which the bearer may come
    aisi: str  # `aud`
    lease_id: str
    epoch: int
    task: str  # `scope`: the pipeline tag the bearer may use
    expires_unix_s: int


def generate_key(path: Path) -> Ed25519PrivateKey:
    """Create a signing key, readable by its owner only."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(pem)
    return key


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key written by `generate_key`."""
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: not an Ed25519 private key")
    return key


def write_public_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write the public half, for anchors."""
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a key written by `write_public_key`."""
    key = serialization.load_pem_public_key(path.read_bytes())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{path}: not an Ed25519 public key")
    return key


def issue(
    key: Ed25519PrivateKey,
    *,
    ue: str,
    addresses: Sequence[str],
    aisi: str,
    lease_id: str,
    epoch: int,
    task: str,
    now_unix_ns: int,
    lease_expires_unix_ns: int,
) -> str:
    """Sign a token for one lease. `exp` is whole seconds, rounded down: never past the lease."""
    return jwt.encode(
        {
            "iss": ISSUER,
            "sub": ue,
            "addresses": list(addresses),
            "aud": aisi,
            "nbf": now_unix_ns // NS_PER_S,
            "exp": lease_expires_unix_ns // NS_PER_S,
            "jti": secrets.token_hex(16),
            "scope": task,
            "lease": lease_id,
            "epoch": epoch,
        },
        key,
        algorithm=ALGORITHM,
    )


def verify(key: Ed25519PublicKey, token: str, aisi: str) -> Claims:
    """Check signature, times, issuer and audience, or raise TokenError."""
    try:
        claims = jwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            audience=aisi,
            issuer=ISSUER,
            options={"require": REQUIRED_CLAIMS},
        )
    except jwt.PyJWTError as error:
        raise TokenError(f"AIST refused: {error}") from None
    if not isinstance(claims["epoch"], int) or not isinstance(claims["lease"], str):
        raise TokenError("AIST refused: a claim is of the wrong type")
    return Claims(
        token_id=claims["jti"],
        ue=claims["sub"],
        addresses=tuple(claims["addresses"]),
        aisi=claims["aud"],
        lease_id=claims["lease"],
        epoch=claims["epoch"],
        task=claims["scope"],
        expires_unix_s=claims["exp"],
    )
