"""The SQLite store: what was acknowledged is there, whole, whatever kills the process."""

import asyncio
import os
import random
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest
from histories import EVERYTHING, T0, Watch, lines

from controlplane.entries import UTC_CLOCK, Chain
from controlplane.evidence import EvidenceLog
from controlplane.facts import Started, UeMoved
from controlplane.sqlite_store import FORMAT, SqliteStore
from controlplane.store import Notice, Sink, StoreError, Write

KILLS = 50
LINES = [line.removesuffix(b"\n") for line in lines(EVERYTHING)]
SINK = Sink("session", "https://app.example/notices", '{"accessToken": "secret"}')
NOTICE = Notice("session", b"body", T0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.db"


def filled(path: Path, *writes: Write) -> None:
    with closing(SqliteStore(path)) as store:
        for write in writes or (Write(LINES[:3]), Write(LINES[3:10])):
            store.write(write)


def kept(path: Path) -> list[bytes]:
    with closing(SqliteStore(path)) as store:
        return list(store.replay())


@contextmanager
def altered(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as somebody else's hands see it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    with altered(path) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


# As it should be


def test_tells_back_what_it_was_told(path: Path) -> None:
    filled(path)
    assert kept(path) == LINES[:10]
    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES[10:]))
        assert list(store.replay()) == LINES
        assert b"".join(store.read(2, 12)) == b"".join(line + b"\n" for line in LINES[2:12])
        assert b"".join(store.read(7, 7)) == b""
    assert kept(path) == LINES


def test_many_entries_are_read_in_pieces(path: Path) -> None:
    many = [b"%d" % number for number in range(1_000)]
    filled(path, Write(many))
    assert kept(path) == many
    with closing(SqliteStore(path)) as store:
        pieces = list(store.read(100, 900))
    assert len(pieces) > 1
    assert b"".join(pieces).split() == many[100:900]


def test_an_append_does_not_hold_up_the_event_loop(path: Path) -> None:
    """The loop goes on while the disk works, and reads what was written before."""

    async def both() -> None:
        turns, writers = 0, set()
        write = store.write

        def noticed(what: Write) -> None:
            writers.add(threading.current_thread())
            write(what)

        store.write = noticed  # type: ignore[method-assign]
        appended = asyncio.ensure_future(store.append(Write(LINES[3:])))
        while not appended.done():
            turns += 1
            assert list(store.read(0, 3))
            await asyncio.sleep(0)
        await appended
        assert turns > 0
        assert threading.main_thread() not in writers

    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES[:3]))
        asyncio.run(both())
        assert list(store.replay()) == LINES


def test_entries_sinks_and_notices_are_one_write(path: Path) -> None:
    filled(path, Write(LINES[:1], [NOTICE], [SINK]), Write(LINES[1:2], [NOTICE]))
    with closing(SqliteStore(path)) as store:
        assert store.sink("session") == SINK
        assert store.sink("another") is None
        assert store.with_sink() == ["session"]
    outbox = rows(path, "outbox")
    assert [row[1:4] for row in outbox] == [("session", SINK.uri, b"body")] * 2


def test_it_is_for_its_owner_only(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES))
        files = list(path.parent.iterdir())
        assert path in files
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_credential_is_in_no_text_of_a_sink() -> None:
    assert "secret" not in repr(Write(LINES, [], [SINK]))


# Killed

PER_WRITE = 3


def write_for_ever(path: Path, say: Callable[[int], object]) -> None:
    """Say how many entries are there, then again after each write."""
    store, chain = SqliteStore(path), Chain(Watch())  # type: ignore[arg-type]
    for line in store.replay():
        chain.check(line)
    while True:
        size = chain.tree.size
        say(size)
        filler = UeMoved("ue2", "x" * 3_000)  # several pages a write
        lines = chain.lines([Started(str(size)), UeMoved("ue1", "gnb1"), filler])
        sink = Sink("s", "https://x.example", str(size))
        store.write(Write(lines, [Notice("s", b"%d" % size, 0)], [sink]))
        for line in lines:
            chain.add(line)


class Writer:
    """Another process that writes until it is killed, at the latest at the end of the context."""

    def __init__(self, path: Path) -> None:
        read, write = os.pipe()
        self._pid: int | None = os.fork()
        if self._pid == 0:
            with suppress(BaseException):
                write_for_ever(path, lambda size: os.write(write, b"%d\n" % size))
            os._exit(1)
        os.close(write)
        self.says = os.fdopen(read, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.says.close()

    def kill(self) -> list[int]:
        """Kill it and return what it had said that was not read yet."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = None
        return [int(line) for line in self.says]


def test_what_was_acknowledged_survives_sigkill(path: Path) -> None:
    """Killed at any instant: every acknowledged write is there, and any other one whole or not."""
    chance, acknowledged = random.Random(5), 0
    for _ in range(KILLS):
        with Writer(path) as writer:
            found = int(writer.says.readline())
            assert found in (acknowledged, acknowledged + PER_WRITE)
            for _ in range(chance.randrange(4)):
                found = int(writer.says.readline())
            time.sleep(chance.random() * 0.003)  # anywhere within the writes to come
            acknowledged = [found, *writer.kill()][-1]
    with closing(SqliteStore(path)) as store:
        read = list(EvidenceLog(store, UTC_CLOCK).replay())
        assert len(read) in (acknowledged, acknowledged + PER_WRITE)
        assert [entry.index for entry in read] == list(range(len(read)))
        last = str(len(read) - PER_WRITE)
        assert store.sink("s") == Sink("s", "https://x.example", last)
    notices = [int(row[3]) for row in rows(path, "outbox")]  # type: ignore[call-overload]
    assert notices == list(range(0, len(read), PER_WRITE))
    assert len(notices) > KILLS


# Refused


def test_another_process_is_refused(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES[:1]))
        with pytest.raises(StoreError, match=r"control\.db: another controller is using it"):
            SqliteStore(path)
        with Writer(path) as other:
            assert other.says.readline() == b""  # it never came so far
        store.write(Write(LINES[1:]))
    assert kept(path) == LINES


def test_another_format_is_refused_and_left_alone(path: Path) -> None:
    filled(path)
    with altered(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(
        StoreError, match=f"is of format {FORMAT + 1}, this version writes {FORMAT}"
    ):
        SqliteStore(path)
    with altered(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    assert kept(path) == LINES[:10]


def test_what_is_no_store_is_refused(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"notes, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"control\.db: file is not a database"):
        SqliteStore(path)
    assert path.read_bytes().startswith(b"notes")
    with pytest.raises(StoreError, match=r"absent/x\.db"):
        SqliteStore(tmp_path / "absent" / "x.db")
    with pytest.raises(StoreError):
        SqliteStore(tmp_path)


@pytest.mark.parametrize("number", [0, 4, 9])
def test_a_missing_entry_is_noticed(path: Path, number: int) -> None:
    """The last one is not: of it only a checkpoint tells."""
    filled(path)
    with altered(path) as connection:
        connection.execute("DELETE FROM entries WHERE number = ?", (number,))
    if number == 9:
        assert kept(path) == LINES[:9]
    else:
        with pytest.raises(StoreError, match="has 9 entries, the last is number 9"):
            SqliteStore(path)


def test_a_damaged_file_is_refused(path: Path) -> None:
    """Pages of the file overwritten: refused when it is opened or read, never told as entries."""
    filled(path, Write(LINES * 20))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\xff" * (size - 4_096))
    with pytest.raises(StoreError, match=r"control\.db: "):
        kept(path)


# A full disk


def test_a_full_disk_refuses_a_write_and_the_store_goes_on(path: Path) -> None:
    """The write that does not fit is wholly absent; what fits later is taken."""
    big = Write([b"x" * 1_000_000], [NOTICE], [Sink("other", "https://x.example", None)])
    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES[:3], sinks=[SINK]))
        (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
        store.connection.execute(f"PRAGMA max_page_count = {pages + 8}")
        for _ in range(3):
            with pytest.raises(StoreError, match=r"control\.db: database or disk is full"):
                store.write(big)
        assert list(store.replay()) == LINES[:3]
        assert store.sink("other") is None
        store.write(Write(LINES[3:6]))
        store.connection.execute(f"PRAGMA max_page_count = {pages + 1_000}")
        store.write(Write(LINES[6:]))
        assert list(store.replay()) == LINES
    assert kept(path) == LINES
    assert rows(path, "outbox") == []


def test_after_a_write_of_unknown_fate_nothing_more_is_taken(path: Path) -> None:
    """If not even rolling back works, only a new start can tell what is there."""

    class Broken:
        """A connection whose disk is gone."""

        in_transaction = True

        def execute(self, statement: str, *values: object) -> None:
            if statement != "BEGIN IMMEDIATE":
                raise sqlite3.OperationalError("disk I/O error")

        executemany = execute

    with closing(SqliteStore(path)) as store:
        store.write(Write(LINES[:3]))
        connection, store.connection = store.connection, Broken()  # type: ignore[assignment]
        with pytest.raises(StoreError, match="disk I/O error"):
            store.write(Write(LINES[3:]))
        store.connection = connection
        with pytest.raises(StoreError, match="takes no more"):
            store.write(Write(LINES[3:]))
    assert kept(path) == LINES[:3]


def test_a_write_is_on_the_disk_before_it_is_acknowledged(path: Path) -> None:
    """What a power cut needs and a kill cannot show: the settings under which SQLite syncs."""
    with closing(SqliteStore(path)) as store:
        ask = store.connection.execute
        assert ask("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ask("PRAGMA synchronous").fetchone() == (2,)  # FULL: each commit syncs the WAL
