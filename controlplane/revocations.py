"""Which AISTs anchors must refuse although they are well signed and have not expired.

A token ends with its lease, and is superseded by the next epoch. Anchors learn of it from the
answer to their next heartbeat: each asks for what is new `since` the last cursor that it was given.
"""

import secrets
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

from controlplane.clock import NS_PER_S, Clock
from controlplane.codec import Record
from controlplane.lease import Committed, DrainStarted, Ended, Lease, Renewed

MAX_AT_ONCE = 1_000  # of one answer


class Revocations:
    """A list that grows at its end and is forgotten from its front, when the tokens are over."""

    def __init__(self, clock: Clock, lease: Callable[[str], Lease]) -> None:
        """`lease`: where to look up the leases that events tell of."""
        self._clock = clock
        self._lease = lease
        self._instance = secrets.token_hex(4)  # cursors of another process mean nothing
        self._entries: deque[tuple[int, dict[str, Any]]] = deque()  # (number, revocation)
        self._next = 1
        self._expires_ns: dict[str, int] = {}  # of the token of each committed lease

    def observe(self, event: Record) -> None:
        """Take in an event that has been folded."""
        match event:
            case Committed(lease_id, expires_ns) | Renewed(lease_id, expires_ns):
                self._expires_ns[lease_id] = expires_ns
            case DrainStarted(lease_id, _):
                terms = self._lease(lease_id).terms
                self._add(lease_id, {"sub": terms.ue, "aud": terms.aisi, "epoch": terms.epoch + 1})
            case Ended(lease_id, _):
                self._add(lease_id, {"lease": lease_id})
                self._expires_ns.pop(lease_id, None)
            case _:
                pass

    def since(self, cursor: str | None) -> tuple[list[dict[str, Any]], str]:
        """Return what is new since a cursor, at most MAX_AT_ONCE of it, and the next cursor.

        Without a cursor, or with one of another process: everything that still matters.
        """
        self._forget()
        instance, _, number = (cursor or "").partition(":")
        seen = int(number) if instance == self._instance and number.isdecimal() else 0
        start = bisect_right(self._entries, seen, key=lambda entry: entry[0])
        found = [self._entries[at] for at in range(start, len(self._entries))[:MAX_AT_ONCE]]
        last = found[-1][0] if found else max(seen, 0)
        return [revocation for _, revocation in found], f"{self._instance}:{last}"

    def _add(self, lease_id: str, revocation: dict[str, Any]) -> None:
        expires_ns = self._expires_ns.get(lease_id, 0)
        if expires_ns <= self._clock.now_ns():
            return  # never granted, or its token has expired
        exp = -(-self._clock.to_unix_ns(expires_ns) // NS_PER_S)
        self._entries.append((self._next, {**revocation, "exp": exp}))
        self._next += 1

    def _forget(self) -> None:
        now_s = self._clock.to_unix_ns(self._clock.now_ns()) / NS_PER_S
        while self._entries and self._entries[0][1]["exp"] <= now_s:
            self._entries.popleft()
