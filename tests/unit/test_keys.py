"""Key files are safe or refused; the ring publishes each key for as long as it is needed."""

import base64
import os
import tempfile
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane import keys
from controlplane.keys import KeyFileError, KeyRing, SigningKey

S = 1_000_000_000
NOW = 1_790_000_000 * S
RETAIN_S = 100


def test_thumbprint_of_rfc_8037() -> None:
    raw = base64.urlsafe_b64decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo=")  # A.2
    assert keys.jwk(Ed25519PublicKey.from_public_bytes(raw)) == {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        "kid": "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",  # A.3
        "alg": "EdDSA",
        "use": "sig",
    }


def test_others_verify_with_the_published_keys(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path / "keys", NOW)
    before = ring.signing.sign("JWT", {"n": 1})
    ring.rotate(NOW + 1)
    after = ring.signing.sign("JWT", {"n": 2})
    published = jwt.PyJWKSet.from_dict(ring.jwks())
    for number, token in enumerate([before, after], start=1):
        header = jwt.get_unverified_header(token)
        key = published[header["kid"]]
        assert header == {"alg": "EdDSA", "kid": key.key_id, "typ": "JWT"}
        assert jwt.decode(token, key, algorithms=["EdDSA"]) == {"n": number}


def test_files_are_for_their_owner(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        KeyRing.open(tmp_path / "keys", NOW)
    finally:
        os.umask(old)
    (file,) = (tmp_path / "keys").iterdir()
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    KeyRing.open(tmp_path / "keys", NOW)
    (file,) = (tmp_path / "keys").iterdir()
    for mode in (0o640, 0o604, 0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(KeyFileError, match=f"run: chmod 600 {file}"):
            KeyRing.open(tmp_path / "keys", NOW)
    file.chmod(0o600)
    (tmp_path / "keys").chmod(0o750)
    with pytest.raises(KeyFileError, match="run: chmod 700"):
        KeyRing.open(tmp_path / "keys", NOW)


def test_a_damaged_or_exchanged_key_is_refused_and_not_quoted(tmp_path: Path) -> None:
    KeyRing.open(tmp_path, NOW)
    (file,) = tmp_path.iterdir()
    pem = file.read_bytes()
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for content in (b"", pem[:60], pem.replace(b"PRIVATE", b"PUBLIC"), other, b"\xff" * 200):
        file.write_bytes(content)
        with pytest.raises(KeyFileError, match=str(file)) as caught:
            KeyRing.open(tmp_path, NOW)
        assert caught.value.__context__ is None
        assert pem.splitlines()[1].decode()[20:] not in str(caught.value)
    file.unlink()
    keys.generate_key(file)
    with pytest.raises(KeyFileError, match="not the one it names"):
        KeyRing.open(tmp_path, NOW)


def test_no_secret_in_a_repr(tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    raw = private.private_bytes_raw()
    ring = KeyRing.open(tmp_path, NOW)
    key = SigningKey(private)
    assert repr(key) == f"SigningKey(kid={key.kid!r})"
    assert ring.signing.kid not in repr(ring)
    assert base64.urlsafe_b64encode(raw).decode()[:40] not in str(keys.jwk(key.public))


@pytest.mark.parametrize("step", ["fdopen", "fsync", "link"])
def test_a_crash_leaves_no_half_written_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    ring = KeyRing.open(tmp_path, NOW)
    before = ring.signing.kid
    with monkeypatch.context() as broken:
        broken.setattr(os, step, crash)
        broken.setattr(Path, "unlink", lambda *_: None)  # a crash tidies nothing up
        with pytest.raises(Crash):
            ring.rotate(NOW + S)
    assert ring.signing.kid == before
    assert len(list(tmp_path.iterdir())) == 2
    again = KeyRing.open(tmp_path, NOW)
    assert (again.signing.kid, len(list(tmp_path.iterdir()))) == (before, 1)


def test_the_newest_signs_even_if_the_clock_was_set_back(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path, NOW)
    kid = ring.rotate(NOW - 3600 * S).kid
    assert KeyRing.open(tmp_path, NOW).signing.kid == ring.signing.kid == kid
    assert ring.signing_since_unix_ns == NOW + 1


def test_a_key_is_kept_from_when_it_was_superseded_not_made(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path, NOW, retain_s=RETAIN_S)
    first = ring.signing.kid
    superseded = NOW + 10 * RETAIN_S * S
    second = ring.rotate(superseded).kid
    assert ring.prune(superseded + RETAIN_S * S - 1) == []
    assert ring.prune(superseded + RETAIN_S * S) == [first]
    assert list(KeyRing.open(tmp_path, NOW).public_keys()) == [second]


def test_single_keys(tmp_path: Path) -> None:
    key = keys.generate_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    keys.write_public_key(key, tmp_path / "key.pub")
    assert keys.load_public_key(tmp_path / "key.pub") == key.public_key()
    assert keys.load_private_key(tmp_path / "key").public_key() == key.public_key()
    with pytest.raises(FileExistsError):
        keys.generate_key(tmp_path / "key")
    assert keys.load_private_key(tmp_path / "key").public_key() == key.public_key()
    with pytest.raises(KeyFileError, match="not an Ed25519 public key"):
        keys.load_public_key(tmp_path / "key")


class Ring(RuleBasedStateMachine):
    """Time goes on; the ring is rotated, pruned and reopened in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = NOW
        self.ring = self.open()
        self.needed: dict[str, int] = {}  # kid: until when what it signed may be shown

    def open(self) -> KeyRing:
        return KeyRing.open(Path(self.folder.name), self.now, retain_s=RETAIN_S)

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(s=st.integers(min_value=0, max_value=RETAIN_S))
    def wait(self, s: int) -> None:
        self.now += s * S

    @rule()
    def sign(self) -> None:
        self.needed[self.ring.signing.kid] = self.now + RETAIN_S * S

    @rule()
    def rotate(self) -> None:
        old = self.ring.signing.kid
        new = self.ring.rotate(self.now)
        assert self.ring.signing.kid == new.kid != old

    @rule()
    def prune(self) -> None:
        before = self.ring.public_keys().keys()
        removed = self.ring.prune(self.now)
        assert self.ring.public_keys().keys() == before - set(removed)
        assert len(list(Path(self.folder.name).iterdir())) == len(self.ring.public_keys())

    @rule()
    def reopen(self) -> None:
        signing, published = self.ring.signing.kid, self.ring.jwks()
        self.ring = self.open()
        assert (self.ring.signing.kid, self.ring.jwks()) == (signing, published)

    @rule()
    def all_superseded_are_removed_in_the_end(self) -> None:
        self.now += (RETAIN_S + 10) * S
        self.ring.prune(self.now)
        assert list(self.ring.public_keys()) == [self.ring.signing.kid]

    @invariant()
    def what_was_signed_stays_verifiable(self) -> None:
        published = {key["kid"] for key in self.ring.jwks()["keys"]}
        assert published >= {kid for kid, until in self.needed.items() if until > self.now}


Ring.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestRing = Ring.TestCase
