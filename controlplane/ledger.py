"""The ledger: every lease and session as the journal tells it, and the only way to change them.

`record` makes events durable and then folds them in, so that memory never runs ahead of evidence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from controlplane.evidence import Journal
from controlplane.lease import Event, Lease, Prepared, State, evolve

LIVE = (State.PREPARED, State.COMMITTED, State.DRAINING)


@dataclass(slots=True)
class Session:
    """One UE's use of one AI service; its leases come and go, its service address stays."""

    session_id: str
    ue: str
    aisi: str
    lease_ids: list[str]


class Ledger:
    """Leases by id, sessions by id, and what follows from them."""

    def __init__(self, journal: Journal) -> None:
        """Rebuild everything from the journal."""
        self._journal = journal
        self._leases: dict[str, Lease] = {}
        self._live: dict[str, Lease] = {}
        self._sessions: dict[str, Session] = {}
        self._latest_session: dict[tuple[str, str], Session] = {}
        self._epochs: dict[tuple[str, str], int] = {}
        self._slots_used: dict[str, int] = {}
        for event in journal.replay():
            self._fold(event)

    def record(self, events: Iterable[Event]) -> None:
        """Make events durable, then let them take effect here."""
        events = list(events)
        if events:
            self._journal.append(events)
            for event in events:
                self._fold(event)

    def lease(self, lease_id: str) -> Lease:
        """Return a lease. KeyError if there never was one."""
        return self._leases[lease_id]

    def live(self) -> Iterator[Lease]:
        """Yield the leases that have not ended."""
        return iter(list(self._live.values()))

    def session(self, session_id: str) -> Session | None:
        """Return a session; None if there never was one."""
        return self._sessions.get(session_id)

    def sessions(self) -> list[Session]:
        """Return the sessions that have a live lease."""
        ids = {lease.terms.session_id for lease in self._live.values()}
        return [session for session in self._sessions.values() if session.session_id in ids]

    def committed(self, session_id: str) -> Lease | None:
        """Return the lease that steers a session now; None if there is none."""
        found = self._in_state(session_id, State.COMMITTED)
        return found[-1] if found else None

    def draining(self, session_id: str) -> list[Lease]:
        """Return a session's leases that are being drained."""
        return self._in_state(session_id, State.DRAINING)

    def _in_state(self, session_id: str, state: State) -> list[Lease]:
        session = self._sessions.get(session_id)
        leases = [self._leases[lease_id] for lease_id in session.lease_ids] if session else []
        return [lease for lease in leases if lease.state is state]

    def session_of(self, ue: str, aisi: str) -> Session | None:
        """Return the live session of a UE with a service; None if there is none."""
        session = self._latest_session.get((ue, aisi))
        if session and any(lease_id in self._live for lease_id in session.lease_ids):
            return session
        return None

    def next_epoch(self, ue: str, aisi: str) -> int:
        """Return an epoch above every earlier one of this UE and service (fencing)."""
        return self._epochs.get((ue, aisi), 0) + 1

    def slots_used(self) -> dict[str, int]:
        """Return reserved or occupied slots, by anchor."""
        return dict(self._slots_used)

    @property
    def journal(self) -> Journal:
        """The evidence log; for reading."""
        return self._journal

    def evidence(self) -> tuple[int, bytes]:
        """Return the number of journal entries and their Merkle root."""
        return self._journal.size, self._journal.root()

    def _fold(self, event: Event) -> None:
        if isinstance(event, Prepared):
            terms = event.terms
            lease_id = terms.lease_id
            session = self._sessions.setdefault(
                terms.session_id, Session(terms.session_id, terms.ue, terms.aisi, [])
            )
            session.lease_ids.append(lease_id)
            pair = (terms.ue, terms.aisi)
            self._latest_session[pair] = session
            self._epochs[pair] = max(self._epochs.get(pair, 0), terms.epoch)
            self._slots_used[terms.anchor] = self._slots_used.get(terms.anchor, 0) + 1
        else:
            lease_id = event.lease_id
        lease = evolve(self._leases.get(lease_id), event)
        self._leases[lease_id] = lease
        if lease.state is State.ENDED:
            if self._live.pop(lease_id, None) is not None:
                self._slots_used[lease.terms.anchor] -= 1
        else:
            self._live[lease_id] = lease
