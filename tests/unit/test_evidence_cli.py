"""`aipaging evidence`: what was tampered with does not verify, and is named."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rfc8785
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fakes import KEY, FakeClock, World

from controlplane.checkpoint import Signer, sign
from controlplane.entries import NO_ENTRY, entry_digest
from controlplane.evidence import Journal, JournalError
from controlplane.intent import Intent
from controlplane.merkle import Tree, leaf_hash
from scripts.errors import UserError
from scripts.evidence import group
from scripts.evidence_files import CHECKPOINT_FILE, VKEY_FILE, check_continues, publish

SIGNER = Signer.of_log(KEY)
OTHER = Signer.of_log(Ed25519PrivateKey.generate())
Lines = list[bytes]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder: a log of ten entries, its checkpoint and its key."""
    folder = tmp_path_factory.mktemp("result")
    world = World(folder)

    async def history() -> None:
        grant = await world.controller.page("ue1", Intent(task="text-generation"))
        await world.controller.page("ue2", Intent(task="text-generation"))
        world.clock.advance(10)
        session_id = grant.lease.terms.session_id
        await world.controller.relocate(session_id, "cloud")
        world.clock.advance(100)
        world.controller.tick()
        world.controller.renew(session_id, 90_000)
        world.controller.release(session_id)

    asyncio.run(history())
    publish(world.journal, SIGNER)
    world.close()
    world.path.rename(folder / "evidence.jsonl")
    return folder


@pytest.fixture
def log(result: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(result, tmp_path / "run")
    return tmp_path / "run" / "evidence.jsonl"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(group, [*map(str, arguments)], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def problems(log: Path, *options: object) -> list[tuple[int | None, str]]:
    """Check that text and JSON agree; return what is wrong."""
    shown, told = (
        run("verify", log, *options),
        json.loads(run("verify", log, *options, "--json").output),
    )
    found = [(finding["index"], finding["rule"]) for finding in told["findings"]]
    assert shown.return_value == (1 if found else 0)
    assert told["verified"] is not bool(found)
    assert shown.output.splitlines()[-1].startswith("NOT verified" if found else "verified")
    for finding in told["findings"]:
        where = "log" if finding["index"] is None else f"entry {finding['index']}"
        assert f"\n{where}: {finding['rule']}: {finding['detail']}\n" in shown.output
    return found


# As it should be


def test_a_result_folder_verifies_by_itself(log: Path) -> None:
    assert problems(log) == []
    output = run("verify", log).output
    assert "10 entries, root" in output
    assert "3 leases of 2 sessions, 1 make-before-break relocations, 1 leases open" in output
    assert f"{SIGNER.name}+{SIGNER.verifier.key_id.hex()}" in output


def test_with_key_and_checkpoint_from_elsewhere(log: Path, tmp_path: Path) -> None:
    log.with_name(VKEY_FILE).rename(tmp_path / "key")
    log.with_name(CHECKPOINT_FILE).rename(tmp_path / "note")
    for key in (tmp_path / "key", SIGNER.verifier):
        assert problems(log, "--key", key, "--checkpoint", tmp_path / "note") == []


def test_entries_after_the_checkpoint_are_counted(log: Path) -> None:
    tree = Tree()
    for line in log.read_bytes().splitlines()[:7]:
        tree.append(leaf_hash(line))
    log.with_name(CHECKPOINT_FILE).write_text(sign(SIGNER, tree.size, tree.root()))
    assert problems(log) == []
    assert "3 later entries are not signed" in run("verify", log).output


# Tampered with

CHANGED_ROOT = (None, "checkpoint")
TAMPERED: list[tuple[str, Callable[[Lines], Lines], list[tuple[int | None, str]]]] = [
    ("first dropped", lambda a: a[1:], [(0, "link"), (None, "checkpoint")]),
    ("one dropped", lambda a: a[:4] + a[5:], [(4, "link"), (None, "checkpoint")]),
    ("truncated", lambda a: a[:-1], [(None, "checkpoint")]),
    ("emptied", lambda a: [], [(None, "checkpoint")]),
    ("one doubled", lambda a: [*a[:5], a[4], *a[5:]], [(5, "link"), CHANGED_ROOT]),
    ("last doubled", lambda a: [*a, a[-1]], [(10, "link")]),
    (
        "two swapped",
        lambda a: [*a[:3], a[4], a[3], *a[5:]],
        [(3, "link"), (4, "link"), (5, "link"), CHANGED_ROOT],
    ),
    ("rewritten", lambda a: [a[0].replace(b"edge1", b"no"), *a[1:]], [(0, "link"), CHANGED_ROOT]),
    ("a stranger", lambda a: [*a[:3], b"[]\n", *a[3:]], [(3, "link"), (4, "link"), CHANGED_ROOT]),
    ("cut short", lambda a: [*a[:-1], a[-1][:-9]], [(9, "link"), CHANGED_ROOT]),
    ("last line not ended", lambda a: [*a[:-1], a[-1][:-1]], [(9, "link")]),
    ("reformatted", lambda a: [*a[:-1], a[-1].replace(b",", b", ")], [(9, "link"), CHANGED_ROOT]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tamper", "named"), [pytest.param(tamper, named, id=name) for name, tamper, named in TAMPERED]
)
def test_tampering_is_named(
    log: Path, tamper: Callable[[Lines], Lines], named: list[tuple[int | None, str]]
) -> None:
    log.write_bytes(b"".join(tamper(log.read_bytes().splitlines(keepends=True))))
    assert problems(log) == named


def test_any_flipped_bit_is_named(log: Path) -> None:
    whole = log.read_bytes()
    for at in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        log.write_bytes(damaged)
        output, entry = run("verify", log).output, whole[:at].count(b"\n")
        assert f"\nentry {entry}: link: " in output
        assert output.endswith("findings\n")


def forged(lines: Lines, change: Callable[[list[dict[str, object]]], None]) -> bytes:
    """Rewrite a log, with all numbers, digests and links put right."""
    entries = [json.loads(line) for line in lines]
    change(entries)
    previous, made = NO_ENTRY, b""
    for index, entry in enumerate(entries):
        del entry["digest"]
        entry.update(index=index, previous=previous.hex())
        line = rfc8785.dumps({**entry, "digest": entry_digest(entry)})
        previous = leaf_hash(line)
        made += line + b"\n"
    return made


def test_a_log_forged_with_care_has_another_root(log: Path) -> None:
    def move(entries: list[dict[str, object]]) -> None:
        entries[0]["terms"]["anchor"] = "edge2"  # type: ignore[index]

    log.write_bytes(forged(log.read_bytes().splitlines(), move))
    assert problems(log) == [CHANGED_ROOT]


def test_what_a_controller_signs_is_not_yet_lawful(log: Path) -> None:
    """A log with a good signature, of a controller that broke the rules."""

    def unlawful(entries: list[dict[str, object]]) -> None:
        del entries[1]  # the COMMIT of what is later relocated

    log.write_bytes(forged(log.read_bytes().splitlines(), unlawful))
    tree = Tree()
    for line in log.read_bytes().splitlines():
        tree.append(leaf_hash(line))
    log.with_name(CHECKPOINT_FILE).write_text(sign(SIGNER, tree.size, tree.root()))
    assert {rule for _, rule in problems(log)} >= {"commit-after-prepare", "make-before-break"}


@pytest.mark.parametrize("value", [None, 5, [], {}, "x", True, 1e300])
@pytest.mark.parametrize("name", ["at", "type", "terms", "until", "epoch", "lease_id", "flows"])
def test_nothing_in_a_forged_log_brings_it_down(log: Path, name: str, value: object) -> None:
    def spoil(entries: list[dict[str, object]]) -> None:
        for entry in entries:
            terms = entry.get("terms")
            where = terms if isinstance(terms, dict) and name in terms else entry
            if name in where:
                where[name] = value

    log.write_bytes(forged(log.read_bytes().splitlines(), spoil))
    assert problems(log)


# Keys and checkpoints


def test_a_wrong_key(log: Path) -> None:
    assert problems(log, "--key", OTHER.verifier) == [(None, "checkpoint")]
    assert f"not signed by {OTHER.name}" in run("verify", log, "--key", OTHER.verifier).output


def test_a_forged_checkpoint(log: Path) -> None:
    note = log.with_name(CHECKPOINT_FILE)
    note.write_text(note.read_text().replace("\n10\n", "\n9\n"))
    assert problems(log) == [(None, "checkpoint")]


@pytest.mark.parametrize("missing", ["evidence.jsonl", CHECKPOINT_FILE, VKEY_FILE])
def test_what_is_missing_is_asked_for(log: Path, missing: str) -> None:
    log.with_name(missing).unlink()
    with pytest.raises(UserError, match=missing) as refused:
        run("verify", log)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("key", ["a+b", "a+00000000+AQ==", str(SIGNER.verifier)[1:]])
def test_what_is_no_key(log: Path, key: str) -> None:
    with pytest.raises(UserError, match="--key: ") as refused:
        run("verify", log, "--key", key)
    assert refused.value.exit_code == 2


# What a controller may sign


def test_a_key_never_signs_two_logs(log: Path) -> None:
    """It signs a log that goes on from what it signed, and no other."""
    whole = log.read_bytes()

    def check(signer: Signer = SIGNER) -> None:
        journal = Journal(log, FakeClock())
        try:
            list(journal.replay())
            check_continues(journal, signer)
        finally:
            journal.close()

    check()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:9]))
    with pytest.raises(JournalError, match="is not the log that"):
        check()
    check(OTHER)
    log.write_bytes(whole)
    note = log.with_name(CHECKPOINT_FILE)
    note.write_text(sign(SIGNER, 4, bytes(32)))
    with pytest.raises(JournalError, match="is not the log that"):
        check()
    note.unlink()
    check()


# Reading


def test_show_tells_what_happened(log: Path) -> None:
    first, second = run("show", log).output.split("\n\n")
    assert ": ue1 with chat\n" in first
    assert ": ue2 with chat\n" in second
    for word in (
        *("prepared", "granted until", "edge1 @1", "cloud @2", "superseded, drains until"),
        *("ended: RELOCATED", "renewed until", "ended: RELEASED"),
    ):
        assert word in first
    assert len(first.splitlines()) == 1 + 8
    assert len(second.splitlines()) == 1 + 2


def test_show_goes_on_behind_damage(log: Path) -> None:
    log.write_bytes(b"nonsense\n" + log.read_bytes()[9:])
    result = run("show", log)
    assert "entry 0: is damaged" in result.stderr
    assert "ue2 with chat" in result.stdout


def test_no_private_key_is_published(result: Path) -> None:
    secret = KEY.private_bytes_raw()
    for file in result.iterdir():
        data = file.read_bytes()
        assert secret not in data
        assert secret.hex().encode() not in data
