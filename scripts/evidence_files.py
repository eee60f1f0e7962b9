"""An exported evidence log, and the files beside it, so that anybody can verify it later."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from controlplane import checkpoint
from controlplane.checkpoint import CheckpointError, Signer
from controlplane.evidence import EvidenceLog
from controlplane.store import StoreError
from scripts.errors import EXIT_BAD_INPUT, UserError

MAX_LINE_BYTES = 1 << 20
CHECKPOINT_FILE = "checkpoint.txt"
VKEY_FILE = "evidence.vkey"  # the public key


def check_continues(folder: Path, log: EvidenceLog, signer: Signer) -> None:
    """Raise StoreError if this key has signed a log that this one does not begin with.

    A key must never sign two such logs. Checkpoints of other keys do not matter.
    """
    path = folder / CHECKPOINT_FILE
    try:
        signed = checkpoint.verify(signer.verifier, path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, CheckpointError):
        return
    if signed.size > log.size or log.tree.root(signed.size) != signed.root:
        raise StoreError(f"the evidence log is not the one that {path} was signed for")


def publish(folder: Path, log: EvidenceLog, signer: Signer) -> None:
    """Write the public key and a checkpoint of the log as it is now."""
    write(folder / VKEY_FILE, f"{signer.verifier}\n")
    write(folder / CHECKPOINT_FILE, checkpoint.sign(signer, log.size, log.root()))


def write(path: Path, text: str) -> None:
    """Write a file; whoever reads it sees the old or the new one, whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def open_log(file: Path) -> BinaryIO:
    """Open an exported log. Raises UserError."""
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}", EXIT_BAD_INPUT) from error


def lines_of(log: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their ends; one that is far too long in pieces."""
    return iter(lambda: log.readline(MAX_LINE_BYTES), b"")
