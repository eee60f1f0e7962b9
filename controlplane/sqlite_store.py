"""The embedded store: one SQLite file in WAL mode, synced in full at every write.

A write runs in a thread of its own, so that the event loop goes on while the disk works. Notices
wait in the same file: they become durable with the entries that they tell of (transactional
outbox), and are delivered from there.
"""

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from controlplane.store import Sink, StoreError, Write

FORMAT = 1  # of the file
PIECE = 256  # entries read at a time
_SCHEMA = """
CREATE TABLE entries (number INTEGER PRIMARY KEY, line BLOB NOT NULL) STRICT;
CREATE TABLE sinks (session_id TEXT PRIMARY KEY, uri TEXT NOT NULL, credential TEXT) STRICT;
CREATE INDEX sinks_by_uri ON sinks (uri);
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL,
    uri TEXT NOT NULL,
    body BLOB NOT NULL,
    is_last INTEGER NOT NULL,
    created_unix_ns INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    not_before_unix_ns INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX outbox_by_uri ON outbox (uri);
"""
# A session whose sink was given up makes no more notices.
_INSERT_NOTICE = """
INSERT INTO outbox (session_id, uri, body, is_last, created_unix_ns)
SELECT session_id, uri, ?, ?, ? FROM sinks WHERE session_id = ?
"""


class SqliteStore:
    """Implements `store.Store`. `sqlite_outbox` works on the same file, in the same thread."""

    def __init__(self, path: Path) -> None:
        """Open or create, readable by its owner only. Raises StoreError."""
        self.path = path
        self._broken = False
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            path.touch(mode=0o600)
            self.connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=0
            )
            self._open()
            self._size = self._count()
        except (OSError, sqlite3.Error) as error:
            self.writer.shutdown()
            raise StoreError(_why(path, error)) from error

    def replay(self) -> Iterator[bytes]:
        """Yield every entry from the beginning."""
        for piece in self._pieces(0, self._size):
            yield from piece

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield entries `start` to before `end`, in pieces of some entries, lines ended."""
        for piece in self._pieces(start, end):
            yield b"".join(line + b"\n" for line in piece)

    async def append(self, write: Write) -> None:
        """Return when all of it is durable."""
        await asyncio.get_running_loop().run_in_executor(self.writer, self.write, write)

    def write(self, write: Write) -> None:
        """Do what `append` does, in the caller's thread."""
        if self._broken:
            raise StoreError(f"{self.path}: a write failed half-way; it takes no more")
        connection = self.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT INTO entries VALUES (?, ?)", enumerate(write.lines, start=self._size)
            )
            if write.sinks:
                connection.executemany(
                    "INSERT OR REPLACE INTO sinks VALUES (?, ?, ?)",
                    [(sink.session_id, sink.uri, sink.credential) for sink in write.sinks],
                )
            if write.notices:
                connection.executemany(
                    _INSERT_NOTICE,
                    [(n.body, n.is_last, n.created_unix_ns, n.session_id) for n in write.notices],
                )
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back(error)
            raise StoreError(_why(self.path, error)) from error
        self._size += len(write.lines)

    def with_sink(self) -> list[str]:
        """Return the sessions that have a sink."""
        with closing(self.connection.execute("SELECT session_id FROM sinks")) as rows:
            return [row[0] for row in rows]

    def sink(self, session_id: str) -> Sink | None:
        """Return where notices about a session go."""
        with closing(
            self.connection.execute("SELECT * FROM sinks WHERE session_id = ?", (session_id,))
        ) as rows:
            row = rows.fetchone()
        return None if row is None else Sink(*row)

    def close(self) -> None:
        """Finish what is being written and close the file."""
        self.writer.shutdown()
        self.connection.close()

    def _open(self) -> None:
        connection = self.connection
        # One process owns the file: it keeps the lock, and needs no shared memory.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            for statement in _SCHEMA.split(";")[:-1]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
        if found not in (0, FORMAT):
            connection.close()
            raise sqlite3.DatabaseError(f"is of format {found}, this version writes {FORMAT}")

    def _count(self) -> int:
        count, last = self.connection.execute(
            "SELECT count(*), ifnull(max(number), -1) FROM entries"
        ).fetchone()
        if count != last + 1:
            raise sqlite3.DatabaseError(f"has {count} entries, the last is number {last}")
        return int(count)

    def _pieces(self, start: int, end: int) -> Iterator[Sequence[bytes]]:
        for at in range(start, end, PIECE):
            until = min(at + PIECE, end)
            try:
                rows = self.connection.execute(
                    "SELECT line FROM entries WHERE number >= ? AND number < ? ORDER BY number",
                    (at, until),
                ).fetchall()
            except sqlite3.Error as error:
                raise StoreError(_why(self.path, error)) from error
            if len(rows) != until - at:
                raise StoreError(f"{self.path}: has become shorter")
            yield [row[0] for row in rows]

    def _roll_back(self, cause: sqlite3.Error) -> None:
        """Leave the file as it was; if that fails, nobody knows how it is.

        Nor does anybody if the device failed: what could not be synced may be there nevertheless.
        """
        self._broken = _primary(cause) == sqlite3.SQLITE_IOERR
        try:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._broken = True


def _primary(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code; 0 if the error is not from there."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return f"{path}: another controller is using it"
    return f"{path}: {error}"
