"""Ed25519 key files, the ring of keys that tokens are signed with, and its JWKS (RFC 7517).

A key is named by its `kid`, the RFC 7638 thumbprint of its public half (RFC 8037). Private keys are
PKCS8 PEM files that only their owner can read. No private key is in a message or a `repr`.
"""

import hashlib
import json
import os
import re
import secrets
from binascii import b2a_base64
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM = "EdDSA"  # RFC 8037
NS_PER_S = 1_000_000_000
RETAIN_S = 90_000  # the longest lease (a day), and an hour
_KEY_FILE = re.compile(r"([0-9]{1,20})-([\w-]{43})\.pem", re.ASCII)  # created (Unix ns), kid
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_UNFINISHED = ".new-*"
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class KeyFileError(ValueError):
    """A key file or folder that cannot be used; the message names it and what to do."""


def _base64url(data: bytes) -> bytes:
    return b2a_base64(data, newline=False).rstrip(b"=").translate(_URL_SAFE)


def _encode_claims(claims: Mapping[str, object]) -> bytes:
    """Return claims as JSON: by orjson, unless there is a number that it may not write right."""
    with suppress(orjson.JSONEncodeError):
        encoded = orjson.dumps(claims)
        if b"null" not in encoded:
            return encoded
    return _encode_json(claims).encode()


def jwk(key: Ed25519PublicKey) -> dict[str, str]:
    """Return a public key as a JSON Web Key (RFC 8037)."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    members = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw).decode()}
    # RFC 7638: the hash of these members alone, in this order, without spaces
    thumbprint = hashlib.sha256(_encode_json(members).encode()).digest()
    return {**members, "kid": _base64url(thumbprint).decode(), "alg": ALGORITHM, "use": "sig"}


def jwks(keys: Iterable[Ed25519PublicKey]) -> dict[str, list[dict[str, str]]]:
    """Return public keys as a JSON Web Key Set."""
    return {"keys": [jwk(key) for key in keys]}


class SigningKey:
    """A private key that signs JWTs (RFC 7519) in the compact form."""

    __slots__ = ("_headers", "_private", "kid", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key()
        self.kid = jwk(self.public)["kid"]
        self._headers: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"

    def sign_bytes(self, data: bytes) -> bytes:
        """Return the Ed25519 signature of some bytes (RFC 8032)."""
        return self._private.sign(data)

    def sign(self, typ: str, claims: Mapping[str, object]) -> str:
        """Return the signed token. ValueError if a number among the claims is not finite.

        Built here and not by PyJWT, which doubles the 38 us that the signature itself takes. The
        header of each `typ` is kept: use few.
        """
        header = self._headers.get(typ)
        if header is None:
            members = {"alg": ALGORITHM, "kid": self.kid, "typ": typ}
            header = self._headers[typ] = _base64url(_encode_json(members).encode()) + b"."
        signed = header + _base64url(_encode_claims(claims))
        return (signed + b"." + _base64url(self._private.sign(signed))).decode("ascii")


@dataclass(frozen=True, slots=True)
class _Held:
    created_unix_ns: int
    key: SigningKey
    path: Path


@dataclass(slots=True, kw_only=True, eq=False)
class KeyRing:
    """The keys in a folder: the newest signs, the others are published until nothing needs them.

    One process owns a folder. Files in it that are not named as keys are let alone.
    """

    folder: Path
    retain_s: int
    _held: list[_Held] = field(repr=False)  # oldest first, never empty

    @classmethod
    def open(cls, folder: Path, now_unix_ns: int, *, retain_s: int = RETAIN_S) -> Self:
        """Load the keys of a folder; make folder and first key if there are none.

        `retain_s`: how long a superseded key stays published, at least as long as the longest life
        of a token. KeyFileError if others can reach the folder or a key, or if a key is damaged.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            raise KeyFileError(f"{folder}: others can reach this folder; run: chmod 700 {folder}")
        for unfinished in folder.glob(_UNFINISHED):  # a crash came between
            unfinished.unlink()
        held = []
        for path in folder.iterdir():
            if match := _KEY_FILE.fullmatch(path.name):
                key = SigningKey(load_private_key(path))
                if key.kid != match[2]:
                    raise KeyFileError(f"{path}: holds the key {key.kid}, not the one it names")
                held.append(_Held(int(match[1]), key, path))
        held.sort(key=lambda one: one.created_unix_ns)
        ring = cls(folder=folder, retain_s=retain_s, _held=held)
        if not held:
            ring.rotate(now_unix_ns)
        return ring

    @property
    def signing(self) -> SigningKey:
        """The key to sign with: the newest."""
        return self._held[-1].key

    @property
    def signing_since_unix_ns(self) -> int:
        """When the signing key was made, so that the caller knows when the next is due."""
        return self._held[-1].created_unix_ns

    def rotate(self, now_unix_ns: int) -> SigningKey:
        """Make a new signing key, durable before it is used. OSError if it cannot be written."""
        created_unix_ns = now_unix_ns
        if self._held:  # the newest by name too, even if the clock was set back
            created_unix_ns = max(now_unix_ns, self.signing_since_unix_ns + 1)
        private = Ed25519PrivateKey.generate()
        key = SigningKey(private)
        path = self.folder / f"{created_unix_ns}-{key.kid}.pem"
        _write_private_key(private, path)
        self._held.append(_Held(created_unix_ns, key, path))
        return key

    def prune(self, now_unix_ns: int) -> list[str]:
        """Remove the keys superseded `retain_s` ago or longer, from memory and disk.

        Returns their `kid`s.
        """
        removed = []
        # A key is superseded when the next one is made.
        while (
            len(self._held) > 1
            and self._held[1].created_unix_ns + self.retain_s * NS_PER_S <= now_unix_ns
        ):
            self._held[0].path.unlink(missing_ok=True)
            removed.append(self._held.pop(0).key.kid)
        return removed

    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        """Return the keys that tokens may be signed with, by `kid`."""
        return {held.key.kid: held.key.public for held in self._held}

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """Return the public halves as a JSON Web Key Set, to be published."""
        return jwks(held.key.public for held in self._held)


def generate_key(path: Path) -> Ed25519PrivateKey:
    """Create a key file, readable by its owner only. FileExistsError if there is one."""
    key = Ed25519PrivateKey.generate()
    _write_private_key(key, path)
    return key


def _write_private_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write a key file that, whenever the machine fails, is there whole or not at all."""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    unfinished = path.with_name(_UNFINISHED.replace("*", secrets.token_hex(8)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(unfinished, flags, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(unfinished, path)  # unlike a rename, this replaces nothing
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a key file. KeyFileError if others can read it, or if it holds no Ed25519 key."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise KeyFileError(f"{path}: others can read this private key; run: chmod 600 {path}")
        pem = file.read()
    key = None
    # The causes are not passed on: they may quote what was read.
    with suppress(ValueError, TypeError, UnsupportedAlgorithm):
        key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: not an Ed25519 private key (PKCS8 PEM, not encrypted)")
    return key


def write_public_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write the public half as PEM."""
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a key written by `write_public_key`. KeyFileError if it holds no Ed25519 key."""
    key = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = serialization.load_pem_public_key(path.read_bytes())
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: not an Ed25519 public key")
    return key
