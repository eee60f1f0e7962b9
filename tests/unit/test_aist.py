"""An AIST is honoured only as issued, only for its AISI, and never past its lease."""

import base64
import json
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from controlplane import aist

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
S = 1_000_000_000


def issue(key: Ed25519PrivateKey = KEY, *, lives_ns: int = 60 * S) -> str:
    now_ns = time.time_ns()
    return aist.issue(
        key,
        ue="ue1",
        addresses=["10.45.0.1", "fd00:45::1"],
        aisi="aisi-1",
        lease_id="lease-1",
        epoch=3,
        task="text-generation",
        now_unix_ns=now_ns,
        lease_expires_unix_ns=now_ns + lives_ns,
    )


def claims() -> dict[str, object]:
    decoded: dict[str, object] = jwt.decode(issue(), options={"verify_signature": False})
    return decoded


def test_says_what_was_issued() -> None:
    found = aist.verify(PUBLIC, issue(), "aisi-1")
    assert (found.ue, found.aisi, found.lease_id) == ("ue1", "aisi-1", "lease-1")
    assert found.addresses == ("10.45.0.1", "fd00:45::1")
    assert (found.epoch, found.task) == (3, "text-generation")


@given(
    now_ns=st.integers(min_value=0, max_value=4_000_000_000 * S),
    lives_ns=st.integers(min_value=0, max_value=86_400 * S),
)
def test_never_outlives_its_lease(now_ns: int, lives_ns: int) -> None:
    token = aist.issue(
        KEY,
        ue="u",
        addresses=["10.45.0.1"],
        aisi="a",
        lease_id="l",
        epoch=1,
        task="t",
        now_unix_ns=now_ns,
        lease_expires_unix_ns=now_ns + lives_ns,
    )
    decoded = jwt.decode(token, options={"verify_signature": False})
    assert decoded["exp"] * S <= now_ns + lives_ns
    assert decoded["nbf"] * S <= now_ns


@pytest.mark.parametrize("lives_ns", [0, -S])
def test_expired_is_refused(lives_ns: int) -> None:
    with pytest.raises(aist.TokenError, match="expired"):
        aist.verify(PUBLIC, issue(lives_ns=lives_ns), "aisi-1")


def test_other_audience_and_other_key_are_refused() -> None:
    with pytest.raises(aist.TokenError, match=r"[Aa]udience"):
        aist.verify(PUBLIC, issue(), "aisi-2")
    with pytest.raises(aist.TokenError, match=r"[Ss]ignature"):
        aist.verify(PUBLIC, issue(Ed25519PrivateKey.generate()), "aisi-1")


def test_algorithm_none_is_refused() -> None:
    with pytest.raises(aist.TokenError):
        aist.verify(PUBLIC, jwt.encode(claims(), None, algorithm="none"), "aisi-1")


def test_public_key_as_shared_secret_is_refused() -> None:
    raw = PUBLIC.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    with pytest.raises(aist.TokenError):
        aist.verify(PUBLIC, jwt.encode(claims(), raw, algorithm="HS256"), "aisi-1")


@pytest.mark.parametrize("name", aist.REQUIRED_CLAIMS)
def test_every_claim_is_needed(name: str) -> None:
    without = {key: value for key, value in claims().items() if key != name}
    with pytest.raises(aist.TokenError):
        aist.verify(PUBLIC, jwt.encode(without, KEY, algorithm="EdDSA"), "aisi-1")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_tampered_is_refused(part: int) -> None:
    parts = issue().split(".")
    raw = bytearray(base64.urlsafe_b64decode(parts[part] + "=="))
    raw[len(raw) // 2] ^= 1
    parts[part] = base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()
    with pytest.raises(aist.TokenError):
        aist.verify(PUBLIC, ".".join(parts), "aisi-1")


def test_raised_epoch_without_signature_is_refused() -> None:
    head, _, signature = issue().split(".")
    body = base64.urlsafe_b64encode(json.dumps({**claims(), "epoch": 9}).encode()).rstrip(b"=")
    with pytest.raises(aist.TokenError):
        aist.verify(PUBLIC, f"{head}.{body.decode()}.{signature}", "aisi-1")


def test_keys_on_disk(tmp_path: Path) -> None:
    key = aist.generate_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    aist.write_public_key(key, tmp_path / "key.pub")
    token = issue(aist.load_private_key(tmp_path / "key"))
    assert aist.verify(aist.load_public_key(tmp_path / "key.pub"), token, "aisi-1").epoch == 3
    with pytest.raises(FileExistsError):
        aist.generate_key(tmp_path / "key")
