"""`aipaging evidence`: verify an evidence log offline, read it, or export it."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from controlplane.audit_rules import Rule
from controlplane.checkpoint import Checkpoint, CheckpointError, Verifier, verify
from controlplane.verification import CHECKPOINT, Problem, Verdict, verify_log
from scripts.cli import LazyGroup
from scripts.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from scripts.evidence_files import CHECKPOINT_FILE, VKEY_FILE, lines_of, open_log

MAX_TEXT_BYTES = 1 << 20
MAX_SHOWN = 100  # problems
MOVES = ("relocations", "recoveries", "repages", "breaks")
COMMANDS = {
    "verify": (
        "scripts.evidence:verify_command",
        "Check links, root, signature and rules of a log.",
    ),
    "show": (
        "scripts.evidence_show:show",
        "Print what happened, session by session.",
    ),
    "export": (
        "scripts.evidence_export:export",
        "Write the log in a daemon's store to a file.",
    ),
}
FILE = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))


@click.group(cls=LazyGroup, commands_at=COMMANDS)
def group() -> None:
    """Verify an evidence log offline, read it, or export it from a daemon's store.

    \b
      aipaging evidence verify results/first/evidence.jsonl
      aipaging evidence show results/first/evidence.jsonl
      aipaging evidence export /var/lib/aipaging/control.db evidence.jsonl
    """


@click.command("verify")
@FILE
@click.option(
    "--key",
    metavar="VKEY|FILE",
    help=f"The log's public key, or a file with it; by default {VKEY_FILE} beside FILE.",
)
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The signed checkpoint; by default {CHECKPOINT_FILE} beside FILE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify_command(file: Path, key: str | None, checkpoint: Path | None, as_json: bool) -> int:
    """Check the evidence log FILE. Needs no network and no private key.

    Every entry must be what its digest says and linked to the one before; the log must be the one
    that was signed; every lease must have kept the rules. Each thing that is wrong is one line
    that names the entry and the rule. Exit code 0: all is well; 1: it is not.

    The signature proves as much as the key: get the key from its owner (--key), since whoever
    forges a log can also forge the files beside it.
    """
    verifier, key_from = _verifier(file, key)
    note = _text(checkpoint or file.with_name(CHECKPOINT_FILE), "checkpoint", "--checkpoint")
    signed: Checkpoint | None = None
    unsigned: list[Problem] = []
    try:
        signed = verify(verifier, note)
    except CheckpointError as error:
        unsigned = [Problem(None, CHECKPOINT, str(error))]
    with open_log(file) as log:
        verdict = verify_log(lines_of(log), signed)
    verdict.problems += unsigned
    if as_json:
        click.echo(json.dumps(_described(verdict, signed, verifier), indent=2))
    else:
        _print(verdict, signed, f"{verifier.name}+{verifier.key_id.hex()}, {key_from}")
    return EXIT_FAILED if verdict.problems else 0


def _print(verdict: Verdict, signed: Checkpoint | None, key: str) -> None:
    counts = verdict.counts
    click.echo(f"entries     {verdict.size}: digests, numbers and links of each")
    if signed:
        later = verdict.size - signed.size
        covers = f"; {later} later entries are not signed" if later > 0 else ""
        click.echo(f"checkpoint  {signed.size} entries, root {signed.root.hex()}{covers}")
        click.echo(f"            signed by {key}")
    click.echo(
        f"rules       {len(Rule)} over {verdict.audited} entries: {counts.sessions} sessions, "
        f"{counts.leases} leases, {len(counts.open_leases)} leases open at the end"
    )
    click.echo(
        f"moves       {counts.relocations} make-before-break, {counts.breaks} break-before-make, "
        f"{counts.recoveries} from a dead anchor, {counts.repages} to another service"
    )
    click.echo(f"pre-empted  {counts.preemptions} leases")
    for lease_id in counts.open_leases[:MAX_SHOWN]:
        click.echo(f"            open: lease {lease_id}")
    for problem in verdict.problems[:MAX_SHOWN]:
        click.echo(str(problem))
    if len(verdict.problems) > MAX_SHOWN:
        click.echo(f"and {len(verdict.problems) - MAX_SHOWN} more; --json has them all")
    found = len(verdict.problems)
    click.echo(f"NOT verified: {found} findings" if found else "verified")


def _described(
    verdict: Verdict, signed: Checkpoint | None, verifier: Verifier
) -> dict[str, object]:
    return {
        "verified": not verdict.problems,
        "entries": verdict.size,
        "root": verdict.root.hex(),
        "checkpoint": {"size": signed.size, "root": signed.root.hex()} if signed else None,
        "key": str(verifier),
        "rules": [rule.value for rule in Rule],
        "audited_entries": verdict.audited,
        **{
            name: getattr(verdict.counts, name)
            for name in ("starts", "leases", "sessions", *MOVES, "preemptions")
        },
        "open_leases": list(verdict.counts.open_leases),
        "findings": [asdict(problem) for problem in verdict.problems],
    }


def _verifier(file: Path, key: str | None) -> tuple[Verifier, str]:
    """Return the public key and where it is from. Raises UserError."""
    path = file.with_name(VKEY_FILE) if key is None else Path(key)
    if key is not None and "+" in key and not path.exists():
        text, source = key, "the key given"
    else:
        text, source = _text(path, "public key", "--key"), f"the key in {path}"
    try:
        return Verifier.parse(text), source
    except CheckpointError as error:
        raise UserError(f"--key: {error}", EXIT_BAD_INPUT) from error


def _text(path: Path, what: str, option: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES).decode()
    except FileNotFoundError:
        message = f"there is no {what} at {path}: name it with {option}"
        raise UserError(message, EXIT_BAD_INPUT) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {what}: {error}", EXIT_BAD_INPUT) from error
