"""The files that lie beside an evidence log, so that anybody can verify it later."""

from pathlib import Path

from controlplane import checkpoint
from controlplane.checkpoint import CheckpointError, Signer
from controlplane.evidence import Journal, JournalError

CHECKPOINT_FILE = "checkpoint.txt"
VKEY_FILE = "evidence.vkey"  # the public key


def check_continues(journal: Journal, signer: Signer) -> None:
    """Raise JournalError if this key has signed a log that the journal does not begin with.

    A key must never sign two such logs. Checkpoints of other keys do not matter.
    """
    path = journal.path.with_name(CHECKPOINT_FILE)
    try:
        signed = checkpoint.verify(signer.verifier, path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, CheckpointError):
        return
    if signed.size > journal.size or journal.tree.root(signed.size) != signed.root:
        raise JournalError(f"{journal.path}: is not the log that {path} was signed for")


def publish(journal: Journal, signer: Signer) -> None:
    """Write the public key and a checkpoint of the log as it is now."""
    write(journal.path.with_name(VKEY_FILE), f"{signer.verifier}\n")
    note = checkpoint.sign(signer, journal.size, journal.root())
    write(journal.path.with_name(CHECKPOINT_FILE), note)


def write(path: Path, text: str) -> None:
    """Write a file; whoever reads it sees the old or the new one, whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
