"""A client gets a token for its secret, and the token says who calls, for whom, and what for."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import access_tokens, aist
from controlplane.access_tokens import (
    SCOPES,
    Client,
    Clients,
    ErrorCode,
    OAuthError,
    Principal,
    TokenService,
    basic_credentials,
    generate_secret,
)
from controlplane.keys import KeyRing

S = 1_000_000_000
NOW = 1_790_000_000
ISSUER, API = "https://core.example", "https://api.example"
READ, WRITE, CAMARA = "sessions:read", "sessions:write", "quality-on-demand:sessions:create"
SECRET, HASH = generate_secret()
APP = Client(client_id="app", secret_hash=HASH, scopes=(READ, WRITE, CAMARA))
OTHER_SECRET, OTHER_HASH = generate_secret()
OTHER = Client(client_id="other", secret_hash=OTHER_HASH, scopes=(READ,))


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.open(tmp_path / "keys", NOW * S)


@pytest.fixture
def service(ring: KeyRing) -> TokenService:
    return serve(ring, [("clinic", APP), ("other", OTHER)])


def serve(ring: KeyRing, clients: list[tuple[str, Client]], **changes: Any) -> TokenService:
    return TokenService(ring, Clients(clients), **{"issuer": ISSUER, "audience": API, **changes})


def token(service: TokenService, scope: str | None = None) -> str:
    granted = service.grant("app", SECRET, scope, NOW)["access_token"]
    assert isinstance(granted, str)
    return granted


def refusal(call: Callable[[], object]) -> tuple[ErrorCode, int]:
    with pytest.raises(OAuthError) as caught:
        call()
    return caught.value.code, caught.value.status


def test_grants_what_rfc_9068_says(service: TokenService, ring: KeyRing) -> None:
    answer = service.grant("app", SECRET, f"{WRITE} {READ}", NOW + 0.7)
    access_token = answer.pop("access_token")
    scope = f"{READ} {WRITE}"
    assert answer == {"token_type": "Bearer", "expires_in": 3600, "scope": scope}
    key = jwt.PyJWKSet.from_dict(ring.jwks())[ring.signing.kid]
    options: Any = {"verify_exp": False, "verify_iat": False}
    claims = jwt.decode(
        access_token, key, algorithms=["EdDSA"], audience=API, issuer=ISSUER, options=options
    )
    assert len(claims.pop("jti")) == 32
    assert claims == {
        "iss": ISSUER,
        "aud": API,
        "sub": "app",
        "client_id": "app",
        "iat": NOW,
        "exp": NOW + 3600,
        "scope": scope,
    }
    assert jwt.get_unverified_header(access_token)["typ"] == "at+jwt"


def test_the_bearer_is_known_by_its_token(service: TokenService) -> None:
    everything, reading = token(service), token(service, READ)
    for _ in range(2):  # the second time from memory
        who = service.authenticate(everything, NOW + 3599)
        assert who == Principal("clinic", "app", frozenset(APP.scopes))
        who.require(WRITE)
        narrow = service.authenticate(reading, NOW)
        narrow.require(READ)
        assert refusal(lambda narrow=narrow: narrow.require(WRITE)) == ("insufficient_scope", 403)
        assert refusal(lambda: service.authenticate(everything, NOW + 3600)) == (
            "invalid_token",
            401,
        )


@pytest.mark.parametrize("scope", [None, ""])
def test_all_scopes_of_the_client_unless_it_asks_for_less(
    service: TokenService, scope: str | None
) -> None:
    assert service.grant("app", SECRET, scope, NOW)["scope"] == " ".join(sorted(APP.scopes))


@pytest.mark.parametrize(
    "scope", [" ", "events:read", f"{READ} events:read", f"{READ}  {WRITE}", f" {READ}", "\x00"]
)
def test_no_other_scope_is_granted(service: TokenService, scope: str) -> None:
    assert refusal(lambda: service.grant("app", SECRET, scope, NOW)) == ("invalid_scope", 400)


def test_only_client_credentials_are_granted(service: TokenService) -> None:
    def grant(secret: str, grant_type: str) -> tuple[ErrorCode, int]:
        return refusal(lambda: service.grant("app", secret, None, NOW, grant_type=grant_type))

    assert grant(SECRET, "password") == ("unsupported_grant_type", 400)
    assert grant("wrong", "password") == ("invalid_client", 401)


@pytest.mark.parametrize(
    ("client_id", "secret"),
    [
        ("app", OTHER_SECRET),
        ("app", SECRET[:-1]),
        ("app", SECRET + "="),
        ("app", HASH),
        ("app", ""),
        ("app", "\ud800"),
        ("other", SECRET),
        ("nobody", SECRET),
        ("", ""),
        ("\x00", "ü"),
    ],
)
def test_without_the_secret_nothing(service: TokenService, client_id: str, secret: str) -> None:
    with pytest.raises(OAuthError) as caught:
        service.grant(client_id, secret, None, NOW)
    assert (caught.value.code, caught.value.status) == ("invalid_client", 401)
    # It does not even say whether there is such a client.
    assert caught.value.description == "no such client, or not its secret"


def test_an_unknown_client_costs_the_same(
    service: TokenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    sha256 = hashlib.sha256

    def counted(data: bytes) -> Any:
        hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(access_tokens.hashlib, "sha256", counted)
    for client_id in ("app", "nobody"):
        refusal(lambda client_id=client_id: service.grant(client_id, "x" * 43, None, NOW))
    assert hashed == [65, 65]


def test_secrets_are_strong_and_stored_as_a_salted_hash() -> None:
    secret, stored = generate_secret()
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert secret not in stored
    assert stored.split("$")[1] != HASH.split("$")[1]
    assert secret != SECRET
    assert stored not in repr(Client(client_id="a", secret_hash=stored, scopes=()))
    with pytest.raises(ValueError, match="store the hash") as caught:
        Client.model_validate({"clientId": "a", "secretHash": secret, "scopes": []})
    assert secret not in json.dumps(caught.value.errors(include_input=False), default=str)


def test_a_client_asks_for_known_scopes_and_is_registered_once() -> None:
    with pytest.raises(ValueError, match="no such scope: sessions:rwx"):
        Client(client_id="a", secret_hash=HASH, scopes=("sessions:rwx",))
    with pytest.raises(ValueError, match="app is given twice"):
        Clients([("one", APP), ("two", APP)])


def test_what_the_registry_takes_back_tokens_lose(service: TokenService, ring: KeyRing) -> None:
    held = token(service)
    narrower = APP.model_copy(update={"scopes": (READ,)})
    assert serve(ring, [("clinic", narrower)]).authenticate(held, NOW).scopes == {READ}
    assert refusal(lambda: serve(ring, []).authenticate(held, NOW)) == ("invalid_token", 401)


def test_other_tokens_are_refused(service: TokenService, ring: KeyRing, tmp_path: Path) -> None:
    good = jwt.decode(token(service), options={"verify_signature": False})
    stranger = KeyRing.open(tmp_path / "stranger", NOW * S)
    session_token = aist.issue(
        ring.signing,
        ue="app",
        addresses=["10.45.0.1"],
        aisi=API,
        lease_id="l",
        epoch=1,
        task="t",
        now_unix_ns=NOW * S,
        lease_expires_unix_ns=(NOW + 60) * S,
        issuer=ISSUER,
    )
    refused = [
        session_token,
        ring.signing.sign("JWT", good),
        stranger.signing.sign("at+jwt", good),
        *(
            ring.signing.sign("at+jwt", {**good, **change})
            for change in (
                {"iss": "other"},
                {"aud": "other"},
                {"aud": [API]},
                {"exp": None},
                {"exp": "1"},
                {"client_id": None},
                {"client_id": ["app"]},
                {"client_id": "nobody"},
            )
        ),
        jwt.encode(good, None, algorithm="none", headers={"typ": "at+jwt"}),
    ]
    for value in refused:
        answer = refusal(lambda value=value: service.authenticate(value, NOW))
        assert answer == ("invalid_token", 401)
    for change in ({"scope": None}, {"scope": [READ]}, {"scope": ""}):
        powerless = ring.signing.sign("at+jwt", {**good, **change})
        assert service.authenticate(powerless, NOW).scopes == frozenset()


def test_tokens_survive_a_rotation_of_keys(service: TokenService, ring: KeyRing) -> None:
    before = token(service)
    ring.rotate((NOW + 1) * S)
    ring.prune((NOW + 3599) * S)
    after = token(service)
    fresh = serve(ring, [("clinic", APP)])
    assert fresh.authenticate(before, NOW + 3599) == fresh.authenticate(after, NOW)


def test_tokens_must_not_outlive_keys(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path / "keys", NOW * S, retain_s=60)
    with pytest.raises(ValueError, match="outlive"):
        serve(ring, [])
    assert serve(ring, [("clinic", APP)], lifetime_s=60).grant("app", SECRET, None, NOW)


@given(st.text(min_size=1), st.text())
def test_basic_credentials_are_read_as_written(client_id: str, secret: str) -> None:
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()
    header = f"bAsIc {base64.b64encode(pair).decode()}"
    assert basic_credentials(header) == (client_id, secret)


@given(
    st.text()
    | st.text().map(lambda text: f"Basic {text}")
    | st.binary().map(lambda data: f"Basic {base64.b64encode(data.replace(b':', b'')).decode()}")
)
def test_other_credentials_are_refused(header: str) -> None:
    with pytest.raises(OAuthError) as caught:
        basic_credentials(header)
    assert caught.value.code == "invalid_client"
    assert caught.value.__cause__ is None


def test_scopes_are_those_of_the_issue_and_camara() -> None:
    assert {scope for scope in SCOPES if scope.startswith("q")} == {
        "quality-on-demand:sessions:create",
        "quality-on-demand:sessions:read",
        "quality-on-demand:sessions:update",
        "quality-on-demand:sessions:delete",
        "quality-on-demand:sessions:retrieve-by-device",
        "qos-profiles:read",
    }
