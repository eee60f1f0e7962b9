"""Which AISTs an anchor must refuse although they are well signed and have not expired.

A token is good at the anchor that its session is at now, whichever of the session's leases it was
issued for: a client does not notice a relocation, so it brings the token that it has. It is void
everywhere when the session has ended, and at an anchor that the session has left, from the end of
the drain there on. That instant is told when the drain begins, with whose connections are to end
by then: the anchor needs no further word.

Anchors learn of it from the answer to their next heartbeat: each asks for what is new `since` the
last cursor that it was given. The latest entry for a UE and an AISI takes the earlier ones' place.
"""

import secrets
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from controlplane.clock import NS_PER_MS, NS_PER_S, Clock
from controlplane.codec import Record
from controlplane.lease import Committed, DrainStarted, Ended, EndReason, Lease, Renewed

MAX_AT_ONCE = 1_000  # of one answer


class Revocations:
    """A list that grows at its end and is forgotten from its front, when the tokens are over."""

    def __init__(self, clock: Clock, leases: Callable[[str], Sequence[Lease]]) -> None:
        """`leases`: of a lease's session, itself among them."""
        self._clock = clock
        self._leases = leases
        self._instance = secrets.token_hex(4)  # cursors of another process mean nothing
        # (number, the anchor that it is for or None: for all, revocation)
        self._entries: deque[tuple[int, str | None, dict[str, Any]]] = deque()
        self._next = 1
        self._expires_ns: dict[str, int] = {}  # of the tokens of each lease that has not ended

    def observe(self, event: Record) -> None:
        """Take in an event that has been folded."""
        match event:
            case Committed(lease_id, expires_ns):
                self._expires_ns[lease_id] = expires_ns
                self._committed(lease_id, expires_ns)
            case Renewed(lease_id, expires_ns):
                self._expires_ns[lease_id] = expires_ns
            case DrainStarted(lease_id, until_ns):
                lease = self._lease(lease_id)
                flows = [[str(flow.ue), str(flow.service)] for flow in lease.terms.flows]
                nbf = self._clock.to_unix_ns(until_ns) // NS_PER_MS / 1000
                self._left(lease, self._expires_ns.get(lease_id, 0), {"nbf": nbf, "flows": flows})
            case Ended(lease_id, reason) if lease_id in self._expires_ns:
                self._ended(lease_id, reason, self._expires_ns.pop(lease_id))
            case _:
                pass

    def since(self, cursor: str | None, anchor: str) -> tuple[list[dict[str, Any]], str]:
        """Return what is new for an anchor since a cursor, MAX_AT_ONCE at most, and the next one.

        Without a cursor, or with one of another process: everything that still matters.
        """
        self._forget()
        instance, _, number = (cursor or "").partition(":")
        seen = int(number) if instance == self._instance and number.isdecimal() else 0
        start = bisect_right(self._entries, seen, key=lambda entry: entry[0])
        found = []
        last = seen
        for at, whose, revocation in islice(self._entries, start, None):
            last = at
            if whose in (None, anchor):
                found.append(revocation)
                if len(found) == MAX_AT_ONCE:
                    break
        return found, f"{self._instance}:{last}"

    def _committed(self, lease_id: str, expires_ns: int) -> None:
        """Tell the anchor that a session has come to that its tokens are good there, all of them.

        It may have been there before.
        """
        lease = self._lease(lease_id)
        first = min(each.terms.epoch for each in self._leases(lease_id))
        if first < lease.terms.epoch:
            self._add(lease, first, expires_ns, lease.terms.anchor)

    def _ended(self, lease_id: str, reason: EndReason, expires_ns: int) -> None:
        lease, leases = self._lease(lease_id), self._leases(lease_id)
        live = [each for each in leases if each.terms.lease_id in self._expires_ns]
        if not any(each.terms.epoch > lease.terms.epoch for each in live):
            above_all = max(each.terms.epoch for each in leases) + 1
            self._add(lease, above_all, expires_ns, None)
        elif reason is not EndReason.RELOCATED and not any(
            each.terms.anchor == lease.terms.anchor for each in live
        ):
            self._left(lease, expires_ns, {})

    def _left(self, lease: Lease, expires_ns: int, more: dict[str, Any]) -> None:
        self._add(lease, lease.terms.epoch + 1, expires_ns, lease.terms.anchor, more)

    def _add(
        self,
        lease: Lease,
        epoch: int,
        expires_ns: int,
        anchor: str | None,
        more: dict[str, Any] | None = None,
    ) -> None:
        terms = lease.terms
        if terms.anchor is None or expires_ns <= self._clock.now_ns():
            return  # QoS alone has no token; or it has expired
        exp = -(-self._clock.to_unix_ns(expires_ns) // NS_PER_S)
        revocation = {"sub": terms.ue, "aud": terms.aisi, "epoch": epoch, "exp": exp}
        self._entries.append((self._next, anchor, {**revocation, **(more or {})}))
        self._next += 1

    def _lease(self, lease_id: str) -> Lease:
        return next(each for each in self._leases(lease_id) if each.terms.lease_id == lease_id)

    def _forget(self) -> None:
        now_s = self._clock.to_unix_ns(self._clock.now_ns()) / NS_PER_S
        while self._entries and self._entries[0][2]["exp"] <= now_s:
            self._entries.popleft()
