"""Killed at any instant: what was acknowledged is there, what was not is whole or absent.

`lives` runs the real control plane, store and clients, and dies by SIGKILL at each step of a
transaction and at random, again and again over the same store. `AIPAGING_TEST_KILLS`: how often.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import World, all_of, scenario
from lives import STEPS, heard, read_kernel

from controlplane.clock import parse_rfc3339
from controlplane.paging import hashed_key
from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError, Write
from controlplane.verification import verify_log

KILLS = int(os.environ.get("AIPAGING_TEST_KILLS", "30"))
LIVES_OF_A_STORE = 10
LIFE_S = 0.5  # at most
PAUSES_S = (0.0, 0.02, 0.06)  # of a client, at most
SEED = int(os.environ.get("AIPAGING_TEST_SEED", "1"))


@contextmanager
def nursery() -> Iterator[Any]:
    """A process that has imported everything, and forks a life whenever it is told to."""
    program = Path(__file__).with_name("lives.py")
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(program.parent)])},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def live(**life: Any) -> dict[str, Any]:
            process.stdin.write(json.dumps(life) + "\n")
            process.stdin.flush()
            told = process.stdout.readline()
            assert told, "the nursery has died"
            ended: dict[str, Any] = json.loads(told)
            return ended

        yield live
        process.stdin.close()


def fates(chance: random.Random) -> Iterator[dict[str, Any]]:
    """How each life goes, and where it ends: by turns at every step, and at random."""
    while True:
        for step in STEPS:
            rare = step in ("before an acknowledgement", "before reconciling", "after reconciling")
            yield {
                "step": step,
                "nth": 1 if rare else chance.randint(1, 12),
                "life_s": LIFE_S,
                "pause_s": 0.3 if step == "before an acknowledgement" else chance.choice(PAUSES_S),
            }
            if chance.random() < 0.5:
                life_s = chance.uniform(0.05, LIFE_S)
                pause_s = chance.choice(PAUSES_S)
                yield {"step": None, "nth": 0, "life_s": life_s, "pause_s": pause_s}


def test_sigkill_at_any_instant(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    fate, died, answers = fates(chance), Counter[str](), Counter[str]()
    folder = tmp_path
    with nursery() as live:
        for number in range(KILLS):
            if number % LIVES_OF_A_STORE == 0:
                folder = tmp_path / str(number)
                folder.mkdir(mode=0o700)
            before = len(heard(folder))
            ended = live(folder=str(folder), seed=number, **next(fate))
            assert ended["signal"] == 9, ended
            notes = heard(folder)
            new = notes[before:]
            died.update(one["killed"] for one in new if "killed" in one)
            died["at random"] += not any("killed" in one for one in new)
            answers.update(one["answered"] for one in new if "answered" in one)
            check(folder, notes)
    print(f"{KILLS} kills: {dict(died)}; answers: {dict(answers)}")
    if len(STEPS) * 3 <= KILLS:
        assert all(died[step] for step in STEPS), died
        assert all(answers[act] for act in ("page", "relocate", "extend", "release")), answers


def check(folder: Path, notes: list[dict[str, Any]]) -> None:
    kernel = read_kernel(folder / "kernel")  # first: it loses by itself what expires
    with closing(SqliteStore(folder / "control.db")) as store:
        lines = list(store.replay())
        sinks = set(store.with_sink())
        with closing(store.connection.execute("SELECT session_id, body FROM outbox")) as rows:
            notices = [(row[0], json.loads(row[1])) for row in rows]
    verdict = verify_log([line + b"\n" for line in lines], None)
    assert not verdict.problems, verdict.problems
    assert all(one["recovered"] for one in notes if "recovered" in one), "kernel and ledger differ"
    log = Log([json.loads(line) for line in lines])
    acknowledged_is_there(log, notes)
    asked_once_is_granted_once(log, notes)
    whole_or_absent(log, sinks, notices)
    kernel_follows_log(log, kernel, notes)


class Log:
    """What the log tells, read without the code that writes it."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.terms: dict[str, dict[str, Any]] = {}
        self.until: dict[str, int] = {}  # of what was granted
        self.committed_at: dict[str, int] = {}  # lease -> index
        self.ended: set[str] = set()
        self.drained: set[str] = set()
        self.of_session: defaultdict[str, list[str]] = defaultdict(list)  # what was granted
        for entry in entries:
            match entry["type"]:
                case "Prepared":
                    self.terms[entry["terms"]["lease_id"]] = entry["terms"]
                case "Committed" | "Renewed":
                    lease_id = entry["lease_id"]
                    self.until[lease_id] = parse_rfc3339(entry["until"])
                    if entry["type"] == "Committed":
                        self.committed_at[lease_id] = entry["index"]
                        self.of_session[self.terms[lease_id]["session_id"]].append(lease_id)
                case "DrainStarted":
                    self.drained.add(entry["lease_id"])
                case "Ended":
                    self.ended.add(entry["lease_id"])


def acknowledged_is_there(log: Log, notes: list[dict[str, Any]]) -> None:
    for one in notes:
        match one.get("answered"):
            case "page" if "refused" not in one:
                assert one["lease"] in log.of_session[one["session"]]
            case "relocate":
                leases = log.of_session[one["session"]]
                at = leases.index(one["lease"])
                assert at > 0
                assert leases[at - 1] in log.drained
            case "extend":
                assert log.until[one["lease"]] >= one["until"]
            case "release":
                assert log.ended.issuperset(log.of_session[one["session"]])


def asked_once_is_granted_once(log: Log, notes: list[dict[str, Any]]) -> None:
    sessions: defaultdict[str, set[str]] = defaultdict(set)
    for lease_id in log.committed_at:
        terms = log.terms[lease_id]
        sessions[terms["key"]].add(terms["session_id"])
    for one in notes:
        if one.get("asked") == "page":
            assert len(sessions[hashed_key("default", one["key"])]) <= 1
    # Nobody pages who has a session, as far as it knows: who is told so was not recognised.
    assert not [one for one in notes if one.get("refused") == "SESSION_EXISTS"]
    for one in notes:  # and every answer, the first and the repeated, is of that session
        if one.get("answered") == "page" and "session" in one:
            assert sessions[hashed_key("default", one["key"])] == {one["session"]}


def whole_or_absent(log: Log, sinks: set[str], notices: list[tuple[str, dict[str, Any]]]) -> None:
    """Entries, sink and notices of a transaction are one write."""
    granted = {log.terms[lease_id]["session_id"] for lease_id in log.committed_at}
    assert sinks == granted  # nobody is there to deliver to
    told = {event["id"] for _, event in notices}
    for lease_id, index in log.committed_at.items():
        first = log.of_session[log.terms[lease_id]["session_id"]][0] == lease_id
        assert f"{index}-{'committed' if first else 'relocated'}" in told
    assert {session for session, _ in notices} == granted


def kernel_follows_log(
    log: Log, kernel: dict[str, dict[str, Any]], notes: list[dict[str, Any]]
) -> None:
    answered = {one["lease"] for one in notes if "lease" in one}
    opened = {one["lease"]: one for one in kernel.values()}
    for lease_id, one in opened.items():
        assert lease_id in log.committed_at, "enforced without a durable COMMIT"
        assert one["anchor"] == log.terms[lease_id]["anchor"]
    for leases in log.of_session.values():
        last = leases[-1]
        if last in answered and last not in log.ended:
            assert last in opened, "acknowledged, and not enforced"


# A disk that fails


@scenario()
async def test_a_device_error_at_commit_closes_the_store_to_writes(world: World) -> None:
    """What could not be synced may be there nevertheless: only a new start can tell."""
    await world.heartbeat("edge1")
    await world.page()
    store = world.store
    assert isinstance(store, SqliteStore)
    store.connection = _Failing(store.connection)  # type: ignore[assignment]
    outcomes = await all_of(world.page("ue2"))
    outcomes += await all_of(world.page("ue3"))
    assert [type(one) for one in outcomes] == [StoreError, StoreError]
    assert "takes no more" in str(outcomes[1])
    assert len(world.enforcer.steering()) == 1
    await world.restart()
    await world.page("ue4")
    assert not world.verdict().problems


class _Failing:
    """A connection whose COMMIT meets a device that does not sync."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return self._connection.execute(sql, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_a_full_disk_is_no_device_error(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "control.db")) as store:
        pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
        store.connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="full"):
            store.write(Write([b"x" * 100_000]))
        store.connection.execute("PRAGMA max_page_count = 100000")
        store.write(Write([b"y"]))
        assert list(store.replay()) == [b"y"]
