"""An anchor honours a token as issued, from its UE, for its service, while its lease lives."""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlplane import aist, keys, verifier
from controlplane.keys import SigningKey
from controlplane.verifier import Reason, TokenError, Verifier

PRIVATE = Ed25519PrivateKey.generate()
KEY = SigningKey(PRIVATE)
JWKS = keys.jwks([KEY.public])
ISSUER, AISI, UE, TASK = "ai-paging", "aisi-1", "10.45.0.1", "text-generation"
S = 1_000_000_000
NOW = 1_790_000_000


def claims(**changes: Any) -> dict[str, Any]:
    good = {
        "iss": ISSUER,
        "sub": "ue1",
        "aud": AISI,
        "nbf": NOW,
        "exp": NOW + 60,
        "jti": "j",
        "scope": TASK,
        "aisi": AISI,
        "lease": "lease-1",
        "epoch": 3,
        "addresses": [UE, "fd00:45::1"],
    }
    return {**good, **changes}


def token(**changes: Any) -> str:
    return KEY.sign("aist+jwt", claims(**changes))


def check(
    value: Any,
    *,
    by: Verifier | None = None,
    aisi: str | frozenset[str] = AISI,
    source: Any = UE,
    task: str | None = TASK,
    now: float = NOW,
) -> verifier.Claims:
    return (by or Verifier(ISSUER, JWKS)).check(value, aisi, source, task, now)


def reason(call: Callable[[], object]) -> Reason:
    with pytest.raises(TokenError) as caught:
        call()
    return caught.value.reason


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_says_what_was_issued() -> None:
    issued = aist.issue(
        KEY,
        ue="ue1",
        addresses=[UE, "fd00:45::1"],
        aisi=AISI,
        lease_id="lease-1",
        epoch=3,
        task=TASK,
        now_unix_ns=NOW * S,
        lease_expires_unix_ns=(NOW + 60) * S,
    )
    found = check(issued)
    assert (found.ue, found.aisi, found.lease_id, found.epoch) == ("ue1", AISI, "lease-1", 3)
    assert [str(address) for address in found.addresses] == [UE, "fd00:45::1"]
    assert (found.task, found.not_before_unix_s, found.expires_unix_s) == (TASK, NOW, NOW + 60)
    assert len(found.token_id) == 32


def test_a_token_is_good_for_its_time_audience_source_and_task() -> None:
    one, good = Verifier(ISSUER, JWKS), token()
    for _ in range(2):  # the second time from memory
        for source in (UE, "fd00:45:0::1", f"::ffff:{UE}"):
            assert check(good, by=one, source=source, now=NOW - 1).lease_id == "lease-1"
        assert check(good, by=one, aisi=frozenset({"other", AISI}), task=None, now=NOW + 59.99)
        assert reason(lambda: check(good, by=one, now=NOW - 1.1)) is Reason.NOT_YET_VALID
        assert reason(lambda: check(good, by=one, now=NOW + 60)) is Reason.EXPIRED
        assert reason(lambda: check(good, by=one, aisi="other")) is Reason.AUDIENCE
        assert reason(lambda: check(good, by=one, aisi=frozenset())) is Reason.AUDIENCE
        assert reason(lambda: check(good, by=one, aisi="x" + AISI)) is Reason.AUDIENCE
        assert reason(lambda: check(good, by=one, task="ocr")) is Reason.SCOPE
        for source in ("10.45.0.2", "fd00:45::2", "", "ue1", None, b"\x0a\x2d\x00\x01", 170721281):
            assert reason(lambda source=source: check(good, by=one, source=source)) is Reason.SOURCE


def forgeries() -> Iterator[Any]:
    raw = KEY.public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    pem = KEY.public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    head, body, signature = token().split(".")
    header = {"alg": "EdDSA", "typ": "aist+jwt", "kid": KEY.kid}

    def signed(content: bytes, **changes: Any) -> str:
        """With a right signature, whatever is signed."""
        part = f"{b64(json.dumps({**header, **changes}).encode())}.{b64(content)}"
        return f"{part}.{b64(PRIVATE.sign(part.encode()))}"

    def hmac(secret: bytes) -> str:
        # PyJWT does not lend itself to this
        part = f"{b64(json.dumps({**header, 'alg': 'HS256'}).encode())}.{body}"
        mac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
        return f"{part}.{b64(mac.sign(part.encode(), secret))}"

    good = json.dumps(claims()).encode()
    none = jwt.encode(claims(), None, algorithm="none", headers={**header, "alg": "none"})
    deep = b"[" * 4000
    yield pytest.param(none, Reason.MALFORMED, id="none")
    yield pytest.param(none + signature, Reason.ALGORITHM, id="none-with-signature")
    yield pytest.param(signed(good, alg="none"), Reason.ALGORITHM, id="signed-none")
    yield pytest.param(signed(good, alg=None), Reason.ALGORITHM, id="no-alg")
    yield pytest.param(signed(good, alg=["EdDSA"]), Reason.ALGORITHM, id="alg-list")
    yield pytest.param(hmac(raw), Reason.ALGORITHM, id="hs256-raw")
    yield pytest.param(hmac(pem), Reason.ALGORITHM, id="hs256-pem")
    yield pytest.param(signed(good, typ="JWT"), Reason.TYPE, id="jwt")
    yield pytest.param(KEY.sign("at+jwt", claims()), Reason.TYPE, id="access-token")
    yield pytest.param(signed(good, kid="other"), Reason.UNKNOWN_KEY, id="other-kid")
    yield pytest.param(signed(good, kid=7), Reason.MALFORMED, id="kid-number")
    yield pytest.param(signed(good, crit=["x"], x=1), Reason.MALFORMED, id="crit")
    yield pytest.param(f"{head}.{body}.{b64(bytes(64))}", Reason.SIGNATURE, id="zeros")
    yield pytest.param(f"{head}.{body}.{b64(b'x')}", Reason.SIGNATURE, id="short")
    yield pytest.param(f"{head}.{body}.{signature}=", Reason.MALFORMED, id="padding")
    yield pytest.param(f"{head}.{body}.{signature}\n", Reason.MALFORMED, id="newline")
    yield pytest.param(f"{head}.{body}", Reason.MALFORMED, id="two-parts")
    yield pytest.param(f"{token()}.{body}", Reason.MALFORMED, id="four-parts")
    yield pytest.param(f"{b64(deep)}.{body}.{signature}", Reason.MALFORMED, id="deep-header")
    yield pytest.param(signed(deep), Reason.MALFORMED, id="deep-payload")
    yield pytest.param(signed(b"[1]"), Reason.MALFORMED, id="list")
    yield pytest.param(signed(b"\xff"), Reason.MALFORMED, id="not-utf-8")
    yield pytest.param(signed(b'{"exp": ' + b"9" * 5000 + b"}"), Reason.MALFORMED, id="digits")
    yield pytest.param(token(jti="x" * 8192), Reason.MALFORMED, id="huge")
    yield pytest.param(token().encode(), Reason.MALFORMED, id="bytes")
    yield pytest.param(None, Reason.MALFORMED, id="nothing")
    yield pytest.param(token(iss="other"), Reason.ISSUER, id="issuer")
    for name, value in [
        *((name, None) for name in aist.REQUIRED_CLAIMS),
        *(("aud", [AISI]), ("aisi", "aisi-2"), ("sub", 5), ("sub", ""), ("lease", 1)),
        *(("exp", True), ("exp", str(NOW + 60)), ("exp", -1), ("exp", 1e300), ("exp", 10**300)),
        *(("nbf", "0"), ("epoch", 3.0), ("epoch", True), ("epoch", -1), ("epoch", 1 << 60)),
        *(("addresses", UE), ("addresses", {UE: 1})),
    ]:
        wrong = token(**{name: value})
        yield pytest.param(wrong, Reason.MALFORMED, id=f"{name}-{str(value)[:9]}")
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        odd = good.replace(str(NOW + 60).encode(), constant)
        yield pytest.param(signed(odd), Reason.MALFORMED, id=f"exp-{constant.decode()}")


@pytest.mark.parametrize(("forged", "expected"), list(forgeries()))
def test_forgeries_are_refused(forged: Any, expected: Reason) -> None:
    with pytest.raises(TokenError) as caught:
        check(forged)
    assert caught.value.reason is expected
    if isinstance(forged, str) and "." in forged:
        assert not any(len(part) > 20 and part in str(caught.value) for part in forged.split("."))


@pytest.mark.parametrize("name", aist.REQUIRED_CLAIMS)
def test_every_claim_is_needed(name: str) -> None:
    without = {key: value for key, value in claims().items() if key != name}
    assert reason(lambda: check(KEY.sign("aist+jwt", without))) is Reason.MALFORMED


def test_addresses_that_are_none_are_nobodys() -> None:
    odd = token(addresses=[None, 170721281, "x", {}, ""])
    for source in (UE, "", "x", 170721281, None):
        assert reason(lambda source=source: check(odd, source=source)) is Reason.SOURCE


GOOD = token()


@given(st.integers(min_value=0, max_value=len(GOOD) - 1), st.integers(min_value=0, max_value=7))
def test_one_flipped_bit_is_refused_or_means_the_same(position: int, bit: int) -> None:
    flipped = bytearray(GOOD.encode())
    flipped[position] ^= 1 << bit
    for changed in (flipped.decode("latin-1"), flipped.decode("utf-8", "surrogateescape")):
        with contextlib.suppress(TokenError):
            assert check(changed) == check(GOOD)


@given(st.text() | st.binary() | st.none() | st.text(alphabet="ey.J-_=0\n"))
@example("." * 5)
@example("\ud800.a.b")
def test_nothing_else_is_a_token(value: Any) -> None:
    with pytest.raises(TokenError):
        check(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(claims(), JSON)))
def test_whatever_is_signed_is_answered_with_a_token_error(value: Any) -> None:
    content = {**claims(), **value} if isinstance(value, dict) else value
    signed = jwt.PyJWS().encode(
        json.dumps(content).encode(),
        PRIVATE,
        algorithm="EdDSA",
        headers={"typ": "aist+jwt", "kid": KEY.kid},
    )
    try:
        found = check(signed)
    except TokenError:
        return
    assert (found.aisi, found.task) == (AISI, TASK)
    assert found.not_before_unix_s - 1 <= NOW < found.expires_unix_s


# Keys


def test_keys_can_be_replaced() -> None:
    new = SigningKey(Ed25519PrivateKey.generate())
    one, old_token, new_token = (
        Verifier(ISSUER, JWKS),
        token(),
        new.sign("aist+jwt", claims()),
    )
    assert check(old_token, by=one)
    assert reason(lambda: check(new_token, by=one)) is Reason.UNKNOWN_KEY
    one.update(jwks=keys.jwks([KEY.public, new.public]))
    assert check(old_token, by=one) == check(new_token, by=one)
    one.update(jwks=keys.jwks([new.public]))
    assert reason(lambda: check(old_token, by=one)) is Reason.UNKNOWN_KEY
    assert check(new_token, by=one)
    with pytest.raises(ValueError, match="not a JWKS"):
        one.update(jwks={"error": "busy"}, revocations=[FLOOR])
    assert check(new_token, by=one)


def test_only_public_ed25519_keys_are_taken() -> None:
    (good,) = JWKS["keys"]
    other = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(ed448.Ed448PrivateKey.generate()))
    private = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(PRIVATE))
    bad: list[Any] = [
        {**other, "kid": "448"},
        {key: value for key, value in other.items() if key != "d"} | {"kid": "448p"},
        {**private, "kid": "private"},
        {"kty": "oct", "k": "AAAA", "kid": "oct"},
        {**good, "x": "AAAA", "kid": "short"},
        {**good, "x": 5, "kid": "number"},
        {key: value for key, value in good.items() if key != "kid"},
        None,
        [],
    ]
    assert list(verifier.public_keys({"keys": [*bad, good]})) == [KEY.kid]


MEMBERS: Any = {"kty": st.sampled_from(["OKP", "EC", "oct", "RSA"]) | JSON} | dict.fromkeys(
    ("kid", "crv", "x", "d", "alg", "k", "n", "e"), JSON
)


@settings(max_examples=30)
@given(
    JSON | st.fixed_dictionaries({"keys": st.lists(st.fixed_dictionaries({}, optional=MEMBERS))})
)
def test_no_jwks_makes_it_fail(value: Any) -> None:
    try:
        assert verifier.public_keys(value) == {}
    except ValueError as error:
        assert "not a JWKS" in str(error)


# Revocation


FLOOR = {"sub": "ue1", "aud": AISI, "epoch": 3, "exp": NOW + 60}


def test_a_token_of_a_smaller_epoch_is_refused_even_if_it_was_good_before() -> None:
    one = Verifier(ISSUER, JWKS)
    assert check(token(epoch=2), by=one)
    one.update(revocations=[FLOOR, {**FLOOR, "sub": "ue2", "epoch": 9}], now_unix_s=NOW)
    assert reason(lambda: check(token(epoch=2), by=one)) is Reason.REVOKED
    assert check(token(epoch=3), by=one)
    assert check(token(epoch=2, sub="ue3"), by=one)
    assert check(token(epoch=2, aud="aisi-2", aisi="aisi-2"), by=one, aisi="aisi-2")


def test_a_session_leaves_at_the_end_of_its_drain_and_may_come_back() -> None:
    one, old = Verifier(ISSUER, JWKS), token(epoch=4)
    one.update(revocations=[FLOOR, {**FLOOR, "epoch": 5, "nbf": NOW + 9}], now_unix_s=NOW)
    assert check(old, by=one, now=NOW + 8.9)
    assert reason(lambda: check(token(epoch=2), by=one, now=NOW + 8.9)) is Reason.REVOKED
    assert reason(lambda: check(old, by=one, now=NOW + 9)) is Reason.REVOKED
    assert check(token(epoch=5), by=one, now=NOW + 9)
    one.update(revocations=[{**FLOOR, "epoch": 4}], now_unix_s=NOW + 10)
    assert check(old, by=one, now=NOW + 10)
    assert reason(lambda: check(token(epoch=3), by=one, now=NOW + 10)) is Reason.REVOKED


def test_revocations_are_forgotten_when_nothing_needs_them() -> None:
    one = Verifier(ISSUER, JWKS)
    for beat in range(1000):
        floor = {"sub": f"ue{beat}", "aud": AISI, "epoch": beat, "exp": NOW + beat + 5.5}
        one.update(revocations=[floor, floor], now_unix_s=NOW + beat)
        assert len(one._revocations) <= 6
        assert len(one._revocations._ends) <= 6
    one.update(now_unix_s=NOW + 1009)
    assert len(one._revocations) == len(one._revocations._ends) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(min_value=0, max_value=20), st.integers(0, 20)
        )
    )
)
def test_a_revocation_holds_until_its_end_and_no_longer(steps: list[tuple[str, int, int]]) -> None:
    one, until = Verifier(ISSUER, JWKS), {"a": 0, "b": 0, "c": 0}
    signed = {ue: token(sub=ue, epoch=2) for ue in until}
    now = 0
    for ue, pause, lasts in steps:
        now += pause
        one.update(
            revocations=[{**FLOOR, "sub": ue, "exp": NOW + now + lasts}], now_unix_s=NOW + now
        )
        until[ue] = max(until[ue], now + lasts)
        held = {name for name, _ in one._revocations._held}
        assert held == {name for name, end in until.items() if end > now}
        for name in held:
            assert reason(lambda name=name: check(signed[name], by=one)) is Reason.REVOKED


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {**FLOOR, "sub": 5},
        {**FLOOR, "exp": float("nan")},
        {**FLOOR, "nbf": "soon"},
        {"sub": "u", "aud": "a", "exp": 1},
        {"sub": "u", "aud": "a", "epoch": 1},
        {"sub": "u", "epoch": 1, "exp": 1},
        "lease",
    ],
)
def test_an_answer_that_is_not_understood_changes_nothing(wrong: Any) -> None:
    one = Verifier(ISSUER, JWKS)
    with pytest.raises(ValueError, match="not a revocation"):
        one.update(jwks={"keys": []}, revocations=[FLOOR, wrong])
    assert check(GOOD, by=one)


# Memory


def test_a_signature_is_checked_once_and_few_tokens_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    verified = verifier.verified_payload

    def counted(value: str, *arguments: Any) -> dict[str, object]:
        calls.append(value)
        return verified(value, *arguments)

    monkeypatch.setattr(verifier, "verified_payload", counted)
    one = Verifier(ISSUER, JWKS)
    one._recent = verifier.Recent(size=2)
    first, second, third = (token(jti=name) for name in "abc")
    for value in (first, first, second, first, third, first, second):
        check(value, by=one)
    assert calls == [first, second, third, second]
    for value in ("x.y.z", "x.y.z"):
        assert reason(lambda value=value: check(value, by=one)) is Reason.MALFORMED
    assert len(one._recent) == 2
