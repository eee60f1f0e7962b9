"""An AIST says what was granted, in a form that any JWT library reads, and ends with its lease."""

import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from controlplane import aist, keys
from controlplane.keys import SigningKey
from controlplane.verifier import Reason, TokenError, Verifier

PRIVATE = Ed25519PrivateKey.generate()
KEY = SigningKey(PRIVATE)
S, MS = 1_000_000_000, 1_000_000
UE = "10.45.0.1"


def issue(now_ns: int, lives_ns: int, **changes: Any) -> str:
    options: dict[str, Any] = {
        "ue": "ue1",
        "addresses": [UE, "fd00:45::1"],
        "aisi": "aisi-1",
        "lease_id": "lease-1",
        "epoch": 3,
        "task": "text-generation",
    }
    return aist.issue(
        KEY, **{**options, **changes}, now_unix_ns=now_ns, lease_expires_unix_ns=now_ns + lives_ns
    )


def payload(token: str) -> dict[str, Any]:
    found = jwt.PyJWS().decode(token, PRIVATE.public_key(), algorithms=["EdDSA"])
    decoded: dict[str, Any] = json.loads(found, parse_float=Decimal)
    return decoded


def test_pyjwt_reads_what_was_issued() -> None:
    now_ns = time.time_ns()
    token = issue(now_ns, 60 * S)
    key = jwt.PyJWKSet.from_dict(keys.jwks([PRIVATE.public_key()]))[KEY.kid]
    claims = jwt.decode(
        token,
        key,
        algorithms=["EdDSA"],
        audience="aisi-1",
        issuer="ai-paging",
        options={"require": aist.REQUIRED_CLAIMS},
    )
    assert len(claims.pop("jti")) == 32
    assert claims == {
        "iss": "ai-paging",
        "sub": "ue1",
        "aud": "aisi-1",
        "nbf": now_ns // S,
        "exp": (now_ns + 60 * S) // S,
        "scope": "text-generation",
        "aisi": "aisi-1",
        "lease": "lease-1",
        "epoch": 3,
        "addresses": [UE, "fd00:45::1"],
    }
    header = jwt.get_unverified_header(token)
    assert header == {"alg": "EdDSA", "kid": KEY.kid, "typ": "aist+jwt"}
    assert payload(issue(now_ns, 60 * S))["jti"] != payload(token)["jti"]


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_is_quoted_rightly(ue: str, aisi: str) -> None:
    token = issue(S, 60 * S, ue=ue, aisi=aisi)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["aud"], claims["aisi"]) == (ue, aisi, aisi)


@given(
    now_ns=st.integers(min_value=0, max_value=4_000_000_000 * S),
    lives_ns=st.integers(min_value=0, max_value=20 * S)
    | st.integers(min_value=0, max_value=86_400 * S),
)
def test_ends_with_its_lease(now_ns: int, lives_ns: int) -> None:
    claims = payload(issue(now_ns, lives_ns))
    lost_ns = now_ns + lives_ns - claims["exp"] * S
    assert claims["nbf"] * S <= now_ns
    assert 0 <= lost_ns < max(MS, min(S, lives_ns / 10 + 1))
    if lives_ns >= 10 * S:
        assert isinstance(claims["exp"], int)


@given(
    into_ns=st.integers(min_value=0, max_value=S - 1),
    lives_ns=st.integers(min_value=50 * MS, max_value=S),
)
def test_a_lease_of_less_than_a_second_can_be_used(into_ns: int, lives_ns: int) -> None:
    now_ns = 1_790_000_000 * S + into_ns
    token = issue(now_ns, lives_ns)
    verifier = Verifier("ai-paging", keys.jwks([PRIVATE.public_key()]))
    for at_ns in (now_ns, now_ns + lives_ns // 2, now_ns + lives_ns - 2 * MS):
        verifier.check(token, "aisi-1", UE, now_unix_s=at_ns / S)
    with pytest.raises(TokenError) as caught:
        verifier.check(token, "aisi-1", UE, now_unix_s=(now_ns + lives_ns + 1000) / S)
    assert caught.value.reason is Reason.EXPIRED


def test_key_files_are_reached_from_here(tmp_path: Path) -> None:
    key = aist.generate_key(tmp_path / "key")
    aist.write_public_key(key, tmp_path / "key.pub")
    assert aist.load_private_key(tmp_path / "key").public_key() == key.public_key()
    assert aist.load_public_key(tmp_path / "key.pub") == key.public_key()
