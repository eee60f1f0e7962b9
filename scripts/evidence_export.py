"""`aipaging evidence export`: the log out of the store of a daemon that does not run."""

import contextlib
from pathlib import Path

import click

from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError
from scripts.errors import EXIT_BAD_INPUT, UserError
from scripts.evidence_files import CHECKPOINT_FILE, VKEY_FILE, write

PATH = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("store", type=PATH)
@click.argument("file", type=PATH)
def export(store: Path, file: Path) -> None:
    """Write the evidence log in STORE, a daemon's control.db, to FILE.

    The public key and the last checkpoint, which lie beside STORE, are copied beside FILE. Nothing
    is verified. While the daemon runs it has the store to itself: ask it, at /evidence/export.
    """
    if not store.exists():
        raise UserError(f"{store}: there is no such store", EXIT_BAD_INPUT)
    try:
        with contextlib.closing(SqliteStore(store)) as opened, file.open("wb") as lines:
            entries = 0
            for line in opened.replay():
                lines.write(line + b"\n")
                entries += 1
        for name in (VKEY_FILE, CHECKPOINT_FILE):
            beside = store.with_name(name)
            if beside.exists():
                write(file.with_name(name), beside.read_text(encoding="utf-8"))
    except (StoreError, OSError) as error:
        raise UserError(str(error)) from error
    click.echo(f"{entries} entries in {file}")
