"""The outbox in the SQLite store: notices that wait to be delivered. See `delivery.Outbox`."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from controlplane.delivery import Delivery
from controlplane.sinks import SinkError, read_credential
from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError

PER_SINK = 8  # deliveries of one turn
Value = TypeVar("Value")

# Sink by sink along the index, however many notices wait for each.
_DUE = """
WITH RECURSIVE uris(uri) AS (
    SELECT min(uri) FROM outbox
    UNION ALL
    SELECT (SELECT min(uri) FROM outbox WHERE uri > uris.uri) FROM uris WHERE uri IS NOT NULL
), heads AS (
    SELECT o.uri, o.number, o.attempts FROM uris
    JOIN outbox o ON o.number = (SELECT min(number) FROM outbox WHERE uri = uris.uri)
    WHERE o.not_before_unix_ns <= ? ORDER BY o.attempts, o.number LIMIT ?
)
SELECT o.number, o.uri, s.credential, o.body, o.created_unix_ns, o.attempts, o.not_before_unix_ns
FROM heads h
JOIN outbox o ON o.number IN (SELECT number FROM outbox WHERE uri = h.uri ORDER BY number LIMIT ?)
LEFT JOIN sinks s ON s.session_id = o.session_id
ORDER BY h.attempts, h.number, o.number
"""
_FORGET_SINK = """
DELETE FROM sinks WHERE session_id = (SELECT session_id FROM outbox WHERE number = ? AND is_last)
"""
_DELETE = "DELETE FROM outbox WHERE number = ?"

log = logging.getLogger(__name__)


class SqliteOutbox:
    """Implements `delivery.Outbox`; works in the store's own thread."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    async def due(self, now_unix_ns: int, limit: int) -> Sequence[Delivery]:
        """Return what may be sent now, to at most `limit` sinks."""

        rows = await self._do(
            lambda connection: connection.execute(_DUE, (now_unix_ns, limit, PER_SINK)).fetchall()
        )
        found: list[Delivery] = []
        unreadable: list[int] = []
        for number, uri, credential, body, created, attempts, not_before in rows:
            try:
                read = None if credential is None else read_credential(credential)
            except SinkError:
                log.error("the credential for notice %d cannot be read: given up", number)
                unreadable.append(number)
                continue
            found.append(
                Delivery(
                    delivery_id=number,
                    sink=uri,
                    credential=read,
                    body=body,
                    created_unix_ns=created,
                    attempts=attempts,
                    not_before_unix_ns=not_before,
                )
            )
        if unreadable:
            await self.done(unreadable)
        return found

    async def done(self, ids: Sequence[int]) -> None:
        """These are delivered."""
        rows = [(number,) for number in ids]
        await self._change((_FORGET_SINK, rows), (_DELETE, rows))

    async def retry(self, delivery_id: int, attempts: int, not_before_unix_ns: int) -> None:
        """This one failed again, and is to wait."""
        statement = "UPDATE outbox SET attempts = ?, not_before_unix_ns = ? WHERE number = ?"
        await self._change((statement, [(attempts, not_before_unix_ns, delivery_id)]))

    async def give_up(self, delivery_id: int, why: str) -> None:
        """This one will not be delivered."""
        await self.done([delivery_id])

    async def give_up_sink(self, sink: str, why: str) -> None:
        """None that waits for this sink will be delivered; its sessions make no more."""
        await self._change(
            ("DELETE FROM outbox WHERE uri = ?", [(sink,)]),
            ("DELETE FROM sinks WHERE uri = ?", [(sink,)]),
        )

    async def _change(self, *steps: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        """Execute statements with their rows in one transaction."""

        def run(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                for statement, rows in steps:
                    connection.executemany(statement, rows)
            except sqlite3.Error:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

        await self._do(run)

    async def _do(self, work: Callable[[sqlite3.Connection], Value]) -> Value:
        def run() -> Value:
            try:
                return work(self._store.connection)
            except sqlite3.Error as error:
                raise StoreError(f"{self._store.path}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._store.writer, run)
