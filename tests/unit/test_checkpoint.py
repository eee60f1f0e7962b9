"""C2SP signed notes and checkpoints, against the published notes of others."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from controlplane.checkpoint import (
    Checkpoint,
    CheckpointError,
    Signer,
    Verifier,
    sign,
    verify,
)

# From the tests of golang.org/x/mod/sumdb/note
VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SKEY = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
SIGNED = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6"
    "KE6RyyBwJnAM=\n"
)
NOTE = f"{TEXT}\n{SIGNED}"
# The example of the tlog-checkpoint specification (its key is not published)
EXAMPLE = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"

LOG = Signer.of_log(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
ROOT = bytes(range(100, 132))
SIGNED_CHECKPOINT = sign(LOG, 17, ROOT)


def peter() -> Signer:
    seed = base64.b64decode(SKEY.split("+", 4)[4])[1:]
    return Signer("PeterNeumann", Ed25519PrivateKey.from_private_bytes(seed))


# As others do it


def test_a_published_note_is_made_bit_for_bit() -> None:
    assert peter().sign(TEXT) == NOTE
    assert str(peter().verifier) == VKEY


def test_a_published_note_verifies() -> None:
    assert Verifier.parse(VKEY).open(NOTE) == TEXT
    assert str(Verifier.parse(VKEY)) == VKEY


def test_no_part_and_no_change_of_a_key_is_a_key() -> None:
    for start in range(len(VKEY)):
        for end in range(start, len(VKEY) + 1):
            if end - start < len(VKEY):
                with pytest.raises(CheckpointError):
                    Verifier.parse(VKEY[start:end])
    for at, letter in enumerate(VKEY):
        with pytest.raises(CheckpointError):
            Verifier.parse(VKEY[:at] + chr(ord(letter) + 1) + VKEY[at + 1 :])
    for published in (  # wrong length, unknown algorithm; each with the right hash
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ):
        with pytest.raises(CheckpointError):
            Verifier.parse(published)


def test_signatures_of_others_are_ignored() -> None:
    other = Signer("EnochRoot", Ed25519PrivateKey.generate()).sign(TEXT).split("\n\n")[1]
    same_name = Signer("PeterNeumann", Ed25519PrivateKey.generate()).sign(TEXT).split("\n\n")[1]
    verifier = Verifier.parse(VKEY)
    for block in (other + SIGNED, SIGNED + other, same_name + SIGNED, SIGNED + SIGNED):
        assert verifier.open(f"{TEXT}\n{block}") == TEXT
    for block in (other, same_name):
        with pytest.raises(CheckpointError, match="not signed by PeterNeumann"):
            verifier.open(f"{TEXT}\n{block}")


def test_a_text_may_hold_what_looks_like_a_signature() -> None:
    note = peter().sign(NOTE)
    assert Verifier.parse(VKEY).open(note) == NOTE


@pytest.mark.parametrize(
    "note",
    [
        "",
        TEXT,
        f"{TEXT}{SIGNED}",  # no empty line
        f"{TEXT}\n",
        f"{TEXT}\n\n",
        f"{TEXT}\n{SIGNED[:-1]}",  # not ended
        f"{TEXT}\n{SIGNED}\n",
        f"{TEXT}\n{SIGNED.replace('—', '-')}",
        f"{TEXT}\n{SIGNED.replace(' x08', '  x08')}",
        f"{TEXT}\n{SIGNED.replace('AM=', 'AN=')}",  # the same bytes, other base64
        f"{TEXT}\n{SIGNED}some words\n",
        f"{TEXT}\n— PeterNeumann x08gow==\n",  # a key id alone
        f"{TEXT}\n— Peter+Neumann {SIGNED.split()[2]}\n",
        NOTE.replace("crypto", "crypt0"),
        NOTE.replace("\n", "\r\n"),
        f"\x01{NOTE}",
        f"{TEXT}\n{SIGNED * 101}",
        NOTE + "x" * 1_000_000,
    ],
)
def test_what_is_no_note_of_this_key(note: str) -> None:
    with pytest.raises(CheckpointError):
        Verifier.parse(VKEY).open(note)


@pytest.mark.parametrize("text", ["", "no newline", "a\rb\n", "\t\n"])
def test_what_cannot_be_signed(text: str) -> None:
    with pytest.raises(CheckpointError):
        peter().sign(text)


# Checkpoints


def test_the_example_of_the_specification() -> None:
    checkpoint = Checkpoint.parse(EXAMPLE)
    assert (checkpoint.origin, checkpoint.size) == ("example.com/behind-the-sofa", 20_852_163)
    assert checkpoint.text() == EXAMPLE


def test_round_trip() -> None:
    assert verify(LOG.verifier, SIGNED_CHECKPOINT) == Checkpoint(LOG.name, 17, ROOT)
    assert verify(Verifier.parse(str(LOG.verifier)), SIGNED_CHECKPOINT).size == 17
    with_more = LOG.sign(Checkpoint(LOG.name, 0, ROOT, ("one", "two words")).text())
    assert verify(LOG.verifier, with_more).extensions == ("one", "two words")


def test_a_key_names_its_log() -> None:
    assert LOG.name.startswith("ai-paging/")
    assert LOG.name != Signer.of_log(Ed25519PrivateKey.generate()).name


@pytest.mark.parametrize(
    "text",
    [
        "log\n1\n",
        EXAMPLE[:-1],
        EXAMPLE + "\n",
        EXAMPLE + "\nextension\n",
        "\n" + EXAMPLE,
        EXAMPLE.replace("20852163", "020852163"),
        EXAMPLE.replace("20852163", "-1"),
        EXAMPLE.replace("20852163", "+1"),
        EXAMPLE.replace("20852163", "２"),  # a digit, but no ASCII one
        EXAMPLE.replace("20852163", "9" * 5_000),
        EXAMPLE.replace("q2I=", "q2J="),
        EXAMPLE.replace("CsUY", ""),
        EXAMPLE.replace("CsUY", "Cs Y"),
    ],
)
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.parse(text)


def test_a_checkpoint_of_another_log_is_refused() -> None:
    note = LOG.sign(Checkpoint("ai-paging/other", 17, ROOT).text())
    with pytest.raises(CheckpointError, match="another log: ai-paging/other"):
        verify(LOG.verifier, note)


@given(st.integers(0, len(SIGNED_CHECKPOINT.encode()) * 8 - 1))
def test_no_flipped_bit_verifies(bit: int) -> None:
    data = bytearray(SIGNED_CHECKPOINT.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CheckpointError, UnicodeDecodeError)):
        verify(LOG.verifier, data.decode())


@given(st.text(max_size=200))
def test_no_text_brings_it_down(text: str) -> None:
    for read in (Verifier.parse, Checkpoint.parse, Verifier.parse(VKEY).open):
        with pytest.raises(CheckpointError):
            read(text)
