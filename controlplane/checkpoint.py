"""Signed checkpoints: the evidence log's size and root, in a form that others' tools read.

A checkpoint is a C2SP tlog-checkpoint (https://c2sp.org/tlog-checkpoint) in a C2SP signed note
(https://c2sp.org/signed-note), signed with Ed25519 (RFC 8032). The key is for evidence alone. It
names the log: a log's origin and key name are `ai-paging/` and the start of the key's SHA-256.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from controlplane.merkle import HASH_BYTES

ED25519 = 1  # signature type
DASH = "\u2014 "  # begins a signature line
MAX_NOTE_BYTES = 1_000_000
MAX_SIGNATURES = 100
KEY_ID_BYTES, KEY_BYTES = 4, 32
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class CheckpointError(Exception):
    """A note, checkpoint or key that is malformed, or that the given key did not sign."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key with the name it signs under."""

    name: str
    public_key: Ed25519PublicKey

    @classmethod
    def parse(cls, vkey: str) -> Self:
        """Read `name+hash+base64(0x01 || public key)`. Raises CheckpointError."""
        name, _, rest = vkey.strip().partition("+")
        key_id, _, encoded = rest.partition("+")
        key = _decode(encoded)
        if len(key) != 1 + KEY_BYTES or key[0] != ED25519 or not _is_name(name):
            raise CheckpointError("not a verifier key for Ed25519 (name+hash+key)")
        try:
            verifier = cls(name, Ed25519PublicKey.from_public_bytes(key[1:]))
        except ValueError as error:
            raise CheckpointError(f"not an Ed25519 public key: {error}") from error
        if verifier.key_id.hex() != key_id:
            raise CheckpointError("a verifier key whose hash is not that of its name and key")
        return verifier

    def __str__(self) -> str:
        key = bytes([ED25519]) + self.public_key.public_bytes_raw()
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(key).decode()}"

    @property
    def key_id(self) -> bytes:
        """SHA-256(name || 0x0A || 0x01 || public key)[:4]."""
        key = self.public_key.public_bytes_raw()
        hashed = hashlib.sha256(self.name.encode() + b"\n" + bytes([ED25519]) + key)
        return hashed.digest()[:KEY_ID_BYTES]

    def open(self, note: str) -> str:
        """Return the text of a note that this key signed. Raises CheckpointError.

        Signatures of other keys are ignored; one of this key that does not verify is not.
        """
        text, signatures = _split(note)
        seen = False
        for name, key_id, signature in signatures:
            if (name, key_id) != (self.name, self.key_id):
                continue
            try:
                self.public_key.verify(signature, text.encode())
            except InvalidSignature:
                raise CheckpointError(f"the signature of {self.name} does not verify") from None
            seen = True
        if not seen:
            names = ", ".join(f"{name}+{key_id.hex()}" for name, key_id, _ in signatures)
            raise CheckpointError(
                f"not signed by {self.name}+{self.key_id.hex()}, but by {names or 'nobody'}"
            )
        return text


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key with the name it signs under."""

    name: str
    key: Ed25519PrivateKey

    @classmethod
    def of_log(cls, key: Ed25519PrivateKey) -> Self:
        """Return the signer of the evidence log that this key belongs to."""
        digest = hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()
        return cls(f"ai-paging/{digest[:16]}", key)

    @property
    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, self.key.public_key())

    def sign(self, text: str) -> str:
        """Return a note of this text. Raises CheckpointError if it cannot be the text of a note."""
        if not text.endswith("\n") or _has_control(text):
            raise CheckpointError("the text of a note is lines without control characters")
        signature = self.verifier.key_id + self.key.sign(text.encode())
        return f"{text}\n{DASH}{self.name} {base64.b64encode(signature).decode()}\n"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log's key says about the log: its size and its root then."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()  # opaque lines

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a note. Raises CheckpointError."""
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop() or not all(lines):
            raise CheckpointError("a checkpoint is at least three lines, none of them empty")
        origin, size, encoded, *extensions = lines
        root = _decode(encoded)
        if not _SIZE.fullmatch(size) or len(root) != HASH_BYTES:
            raise CheckpointError("a checkpoint has a size, then a root hash of SHA-256")
        return cls(origin, int(size), root, tuple(extensions))

    def text(self) -> str:
        """Return the text to sign."""
        root = base64.b64encode(self.root).decode()
        return "".join(
            f"{line}\n" for line in (self.origin, str(self.size), root, *self.extensions)
        )


def sign(signer: Signer, size: int, root: bytes) -> str:
    """Return the note by which a log's key vouches for its root at a size."""
    return signer.sign(Checkpoint(signer.name, size, root).text())


def verify(verifier: Verifier, note: str) -> Checkpoint:
    """Return what a note says that the log's own key signed. Raises CheckpointError."""
    checkpoint = Checkpoint.parse(verifier.open(note))
    if checkpoint.origin != verifier.name:
        raise CheckpointError(f"a checkpoint of another log: {checkpoint.origin}")
    return checkpoint


def _split(note: str) -> tuple[str, Sequence[tuple[str, bytes, bytes]]]:
    """Return text and signatures (name, key id, signature). Raises CheckpointError."""
    if len(note) > MAX_NOTE_BYTES or _has_control(note):
        raise CheckpointError("too long, or with control characters: no note")
    text, blank, block = note.rpartition("\n\n")
    if not blank or not block.endswith("\n"):
        raise CheckpointError("a note is a text, an empty line, and signature lines")
    signatures = []
    for line in block.split("\n")[:-1]:
        name, _, encoded = line.removeprefix(DASH).partition(" ")
        signature = _decode(encoded)
        if not line.startswith(DASH) or not _is_name(name) or len(signature) <= KEY_ID_BYTES:
            raise CheckpointError("a malformed signature line")
        signatures.append((name, signature[:KEY_ID_BYTES], signature[KEY_ID_BYTES:]))
    if len(signatures) > MAX_SIGNATURES:
        raise CheckpointError(f"more than {MAX_SIGNATURES} signatures")
    return f"{text}\n", signatures


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(letter.isspace() for letter in name)


def _has_control(text: str) -> bool:
    return any(letter < " " and letter != "\n" for letter in text)


def _decode(encoded: str) -> bytes:
    """Read base64 (RFC 4648, section 4), in its one canonical form. Raises CheckpointError."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"not base64: {error}") from error
    if base64.b64encode(data).decode() != encoded:
        raise CheckpointError("not canonical base64")
    return data
