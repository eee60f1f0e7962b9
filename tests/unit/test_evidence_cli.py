"""`aipaging evidence`: what was tampered with does not verify, and is named."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import rfc8785
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from histories import EVERYTHING, MOVE, lines, prepared

from controlplane.checkpoint import Checkpoint, Signer, sign
from controlplane.clock import Clock
from controlplane.entries import NO_ENTRY, entry_digest
from controlplane.evidence import EvidenceLog
from controlplane.merkle import Tree, leaf_hash
from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError, Write
from controlplane.verification import verify_log
from scripts.errors import UserError
from scripts.evidence import group
from scripts.evidence_files import CHECKPOINT_FILE, VKEY_FILE, check_continues, publish

KEY = Ed25519PrivateKey.generate()
SIGNER = Signer.of_log(KEY)
OTHER = Signer.of_log(Ed25519PrivateKey.generate())
Lines = list[bytes]


LOG = lines(EVERYTHING)
SIZE = len(LOG)


def signed(log: Lines) -> str:
    """The checkpoint of a log, by its own key."""
    tree = Tree()
    for line in log:
        tree.append(leaf_hash(line.removesuffix(b"\n")))
    return sign(SIGNER, tree.size, tree.root())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A result folder: a log with entries of every kind, its checkpoint and its key."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CHECKPOINT_FILE).write_text(signed(LOG))
    (folder / VKEY_FILE).write_text(f"{SIGNER.verifier}\n")
    file = folder / "evidence.jsonl"
    file.write_bytes(b"".join(LOG))
    return file


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
    assert f"{SIZE} entries, root" in output
    assert "7 sessions, 9 leases, 0 leases open at the end" in output
    assert "1 make-before-break, 0 break-before-make, 1 from a dead anchor, 1 to another" in output
    assert f"{SIGNER.name}+{SIGNER.verifier.key_id.hex()}" in output


def test_with_key_and_checkpoint_from_elsewhere(log: Path, tmp_path: Path) -> None:
    log.with_name(VKEY_FILE).rename(tmp_path / "key")
    log.with_name(CHECKPOINT_FILE).rename(tmp_path / "note")
    for key in (tmp_path / "key", SIGNER.verifier):
        assert problems(log, "--key", key, "--checkpoint", tmp_path / "note") == []


def test_entries_after_the_checkpoint_are_counted(log: Path) -> None:
    log.with_name(CHECKPOINT_FILE).write_text(signed(LOG[:-3]))
    assert problems(log) == []
    assert "3 later entries are not signed" in run("verify", log).output


# Tampered with

CHANGED_ROOT = (None, "checkpoint")
LAST = SIZE - 1
TAMPERED: list[tuple[str, Callable[[Lines], Lines], list[tuple[int | None, str]]]] = [
    ("first dropped", lambda a: a[1:], [(0, "link"), CHANGED_ROOT]),
    ("one dropped", lambda a: a[:4] + a[5:], [(4, "link"), CHANGED_ROOT]),
    ("truncated", lambda a: a[:-1], [CHANGED_ROOT]),
    ("emptied", lambda a: [], [CHANGED_ROOT]),
    ("one doubled", lambda a: [*a[:5], a[4], *a[5:]], [(5, "link"), CHANGED_ROOT]),
    ("last doubled", lambda a: [*a, a[-1]], [(SIZE, "link")]),
    (
        "two swapped",
        lambda a: [*a[:3], a[4], a[3], *a[5:]],
        [(3, "link"), (4, "link"), (5, "link"), CHANGED_ROOT],
    ),
    ("rewritten", lambda a: [a[0].replace(b"first", b"no"), *a[1:]], [(0, "link"), CHANGED_ROOT]),
    ("a stranger", lambda a: [*a[:3], b"[]\n", *a[3:]], [(3, "link"), (4, "link"), CHANGED_ROOT]),
    ("cut short", lambda a: [*a[:-1], a[-1][:-9]], [(LAST, "link"), CHANGED_ROOT]),
    ("last line not ended", lambda a: [*a[:-1], a[-1][:-1]], [(LAST, "link")]),
    ("spaced", lambda a: [*a[:-1], a[-1].replace(b",", b", ")], [(LAST, "link"), CHANGED_ROOT]),
]


@pytest.mark.parametrize(
    ("tamper", "named"), [pytest.param(tamper, named, id=name) for name, tamper, named in TAMPERED]
)
def test_tampering_is_named(
    log: Path, tamper: Callable[[Lines], Lines], named: list[tuple[int | None, str]]
) -> None:
    log.write_bytes(b"".join(tamper(LOG)))
    assert problems(log) == named


def first_problem(log: Lines) -> tuple[int | None, str]:
    """What the verdict names first, of a log whose checkpoint is that of the good one."""
    checkpoint = SIGNER.verifier.open(signed(LOG))
    verdict = verify_log(iter(log), Checkpoint.parse(checkpoint))
    problem = verdict.problems[0]
    return problem.index, problem.rule


def test_any_entry_dropped_doubled_or_out_of_order_is_named() -> None:
    for at in range(SIZE):
        dropped = [*LOG[:at], *LOG[at + 1 :]]
        assert first_problem(dropped) == ((at, "link") if at < LAST else CHANGED_ROOT)
        assert first_problem([*LOG[: at + 1], *LOG[at:]]) == (at + 1, "link")
        for to in {0, SIZE // 2, LAST} - {at}:
            moved = [*dropped[:to], LOG[at], *dropped[to:]]
            assert first_problem(moved) == (min(at, to), "link")


def test_any_flipped_bit_is_named() -> None:
    """In keys, values, punctuation and line ends, of entries of every kind."""
    whole = b"".join(LOG)
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for at in [*range(0, len(whole), 19), *ends]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        entry = whole[:at].count(b"\n")
        assert first_problem(list(io.BytesIO(damaged))) == (entry, "link")


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
        for entry in entries:
            if entry["type"] == "Prepared":
                entry["terms"]["anchor"] = "edge9"  # type: ignore[index]
                return

    log.write_bytes(forged(LOG, move))
    assert problems(log) == [CHANGED_ROOT]


def test_what_a_controller_signs_is_not_yet_lawful(log: Path) -> None:
    """A log with a good signature, of a controller that broke the rules."""
    kinds = [json.loads(line)["type"] for line in LOG]

    def unlawful(entries: list[dict[str, object]]) -> None:
        del entries[kinds.index("DrainStarted")]

    log.write_bytes(forged(LOG, unlawful))
    log.with_name(CHECKPOINT_FILE).write_text(signed(log.read_bytes().splitlines()))
    flip = kinds.index("DrainStarted") - 1
    assert (flip, "make-before-break") in problems(log)


@pytest.mark.parametrize("value", [None, 5, [], {}, "x", True, 1e300])
@pytest.mark.parametrize(
    "name",
    [
        *("at", "type", "terms", "until", "epoch", "lease_id", "flows", "intent", "usage"),
        *("counted", "leases", "acknowledged", "anchor", "policy", "uplink_bytes", "extra"),
    ],
)
def test_nothing_in_a_forged_log_brings_it_down(log: Path, name: str, value: object) -> None:
    def spoil(entries: list[dict[str, object]]) -> None:
        for entry in entries:
            inner = [part for part in entry.values() if isinstance(part, dict) and name in part]
            where = inner[0] if inner else entry
            if name in where or name == "extra":
                where[name] = value

    log.write_bytes(forged(LOG, spoil))
    assert problems(log)


# Keys and checkpoints


def test_a_wrong_key(log: Path) -> None:
    assert problems(log, "--key", OTHER.verifier) == [(None, "checkpoint")]
    assert f"not signed by {OTHER.name}" in run("verify", log, "--key", OTHER.verifier).output


def test_a_forged_checkpoint(log: Path) -> None:
    note = log.with_name(CHECKPOINT_FILE)
    note.write_text(note.read_text().replace(f"\n{SIZE}\n", f"\n{LAST}\n"))
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


def test_a_key_never_signs_two_logs(tmp_path: Path) -> None:
    """It signs a log that goes on from what it signed, and no other."""

    def check(log: Lines, signer: Signer = SIGNER) -> None:
        with contextlib.closing(SqliteStore(tmp_path / f"{len(log)}.db")) as store:
            store.write(Write([line.removesuffix(b"\n") for line in log]))
            read = EvidenceLog(store, Clock(unix_offset_ns=0))
            list(read.replay())
            check_continues(tmp_path, read, signer)
            if note.exists():
                return
            publish(tmp_path, read, signer)

    note = tmp_path / CHECKPOINT_FILE
    check(LOG[:9])
    assert note.read_text() == signed(LOG[:9])
    assert (tmp_path / VKEY_FILE).read_text() == f"{SIGNER.verifier}\n"
    check(LOG)
    with pytest.raises(StoreError, match="is not the one that"):
        check(LOG[:8])
    check(LOG[:7], OTHER)
    note.write_text(sign(SIGNER, 4, bytes(32)))
    with pytest.raises(StoreError, match="is not the one that"):
        check(LOG[:10])


# Reading


def test_show_tells_what_happened(log: Path) -> None:
    *sessions, network = run("show", log).output.split("\n\n")
    assert len(sessions) == 7
    assert sessions[0].splitlines() == [
        "session s: ue1 with chat, of clinic",
        "       3  2025-10-09T08:53:20.000000Z  edge1 @1  prepared for PAGE, "
        "until 08:54:59.000 at the latest",
        "       4  2025-10-09T08:53:21.000000Z  edge1 @1  granted until 08:54:20.000",
        "       5  2025-10-09T08:53:21.100000Z  edge1 @1  enforced since 08:53:21.050",
        *sessions[0].splitlines()[4:],
    ]
    for word in (
        *("superseded, drains until", "edge1 @2  prepared for REQUEST", "renewed until"),
        "ended: RELOCATED; carried 10 packets (1,000 bytes) up, 20 (2,000) down",
    ):
        assert word in sessions[0]
    told = "\n".join(sessions)
    for word in ("QoS alone @1", "ended: PREEMPTED", "ended: REPAGED", "ended: NOT_ENFORCED"):
        assert word in told
    assert network.splitlines()[0] == "network"
    for word in (
        *("controller first took over", "edge3 registered by acme: 4 slots, north"),
        *("clinic has another policy: maxSessions=9", "ue2 moved to gnb2", "edge1 failed: dead"),
        *("edge1 recovered", "edge2 takes no new sessions", "edge3 was withdrawn"),
    ):
        assert word in network


def test_show_goes_on_behind_damage(log: Path) -> None:
    log.write_bytes(b"nonsense\n" + log.read_bytes()[9:])
    result = run("show", log)
    assert "entry 0: is damaged" in result.stderr
    assert "ue2 with chat" in result.stdout


def test_show_names_what_it_cannot_place(log: Path) -> None:
    log.write_bytes(b"".join(lines([(1, MOVE[1][1]), (2, [prepared()])])))
    result = run("show", log)
    assert "entry 0: lease 'a' is unknown" in result.stderr
    assert "session s" in result.stdout


# Exporting


def test_what_is_exported_verifies(tmp_path: Path) -> None:
    state, to = tmp_path / "state", tmp_path / "to"
    state.mkdir()
    to.mkdir()
    with contextlib.closing(SqliteStore(state / "control.db")) as store:
        store.write(Write([line.removesuffix(b"\n") for line in LOG]))
        read = EvidenceLog(store, Clock(unix_offset_ns=0))
        list(read.replay())
        publish(state, read, SIGNER)
        with pytest.raises(UserError, match="another controller is using it"):
            run("export", state / "control.db", to / "log")
    run("export", state / "control.db", to / "log")
    assert (to / "log").read_bytes() == b"".join(LOG)
    assert problems(to / "log") == []


def test_there_is_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such store"):
        run("export", tmp_path / "control.db", tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
