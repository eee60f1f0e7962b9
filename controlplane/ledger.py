"""The ledger: all that the evidence log tells, folded: leases, sessions, anchors, cells, policies.

Nothing here decides, and nothing but `fold` changes anything: an event is folded once it is
durable, so that memory never runs ahead of evidence. Ended sessions are kept for a while, to be
asked for; the log has them for ever.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from controlplane.admission import Demand, Pools
from controlplane.clock import NS_PER_S
from controlplane.codec import Record
from controlplane.deadlines import Deadlines
from controlplane.facts import Acknowledged, PolicySet, Started, UeMoved, UplinkHeld, UplinkResumed
from controlplane.fleet import Fleet
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Lease,
    Prepared,
    Renewed,
    State,
    Terms,
    evolve,
)
from controlplane.policy import Policy

RETAIN_NS = 600 * NS_PER_S  # CAMARA Quality-on-Demand asks for 360 s
MAX_RETAINED = 10_000  # ended sessions
QOS_ALONE = "qod:"  # what the `aisi` of a lease of QoS alone begins with
_AS_ASKED = (EndReason.EXPIRED, EndReason.RELEASED, EndReason.NOT_ENFORCED)


@dataclass(slots=True)
class Session:
    """One UE's use of one AI service; its leases come and go, its service address stays."""

    session_id: str
    tenant: str
    ue: str
    aisi: str
    lease_ids: list[str] = field(default_factory=list)
    live: int = 0  # leases that have not ended
    started_ns: int | None = None  # its first COMMIT
    ended_ns: int | None = None
    hidden: bool = False  # from CAMARA's API: its client has deleted it
    key: str | None = None
    counted: Terms | None = None  # under which it counts among what its tenant holds


@dataclass(slots=True)
class Held:
    """What a tenant's live sessions hold together, at present."""

    sessions: int = 0
    downlink_bps: int = 0  # guaranteed
    uplink_bps: int = 0


def demand(terms: Terms) -> Demand:
    """Return what a lease under these terms needs."""
    return Demand(
        anchor=terms.anchor,
        cell=terms.cell,
        downlink_bps=terms.downlink_bps,
        uplink_bps=terms.uplink_bps,
    )


class Ledger:
    """Leases by id, sessions by id, and what follows from them."""

    def __init__(self, fleet: Fleet, pools: Pools) -> None:
        """`fleet` and `pools` as configured, before any event."""
        self.fleet = fleet
        self.pools = pools
        self.cells: dict[str, str] = {}  # where a mobility report has put a UE
        self.policies: dict[str, Policy] = {}  # set over the API
        self._leases: dict[str, Lease] = {}
        self._sessions: dict[str, Session] = {}
        self._current: dict[tuple[str, str], Session] = {}  # live ones, by UE and service
        self._epochs: dict[tuple[str, str], int] = {}
        self._by_ue: defaultdict[str, dict[str, Session]] = defaultdict(dict)  # live
        self._held: dict[str, Held] = {}  # by tenant
        self._expected: set[str] = set()  # session ids: counted there, and not prepared yet
        self._by_tenant: defaultdict[str, dict[str, Session]] = defaultdict(dict)  # live
        self._lingering: defaultdict[str, dict[str, Session]] = defaultdict(dict)  # by UE
        self._by_anchor: defaultdict[str, set[str]] = defaultdict(set)  # live lease ids
        self._by_key: dict[str, Session] = {}
        self.deadlines = Deadlines(self._leases.get)
        self._ended: deque[Session] = deque()

    # What there is

    def lease(self, lease_id: str) -> Lease:
        """Return a lease. KeyError if there is none, or none any more."""
        return self._leases[lease_id]

    def find_lease(self, lease_id: str) -> Lease | None:
        """Return a lease; None if there is none, or none any more."""
        return self._leases.get(lease_id)

    def live(self) -> Iterator[Lease]:
        """Yield the leases that have not ended."""
        for session in list(self._current.values()):
            for lease_id in session.lease_ids:
                lease = self._leases[lease_id]
                if lease.state is not State.ENDED:
                    yield lease

    @property
    def live_sessions(self) -> int:
        """Number of sessions with a live lease."""
        return len(self._current)

    def session(self, session_id: str) -> Session | None:
        """Return a session; None if there is none, or none any more."""
        return self._sessions.get(session_id)

    def sessions(self, *, ue: str | None = None, tenant: str | None = None) -> list[Session]:
        """Return live sessions: all, a UE's, or a tenant's."""
        if ue is not None:
            return list(self._by_ue.get(ue, {}).values())
        if tenant is not None:
            return list(self._by_tenant.get(tenant, {}).values())
        return list(self._current.values())

    def held_by(self, tenant: str) -> Held:
        """Return what a tenant's sessions hold together: those that live, and are expected to."""
        return self._held.get(tenant, Held())

    def lingering(self, ue: str) -> list[Session]:
        """Return a UE's sessions of QoS alone that the network ended and nobody has deleted yet.

        They go when their client deletes them, or when they are forgotten (CAMARA
        Quality-on-Demand, createSession).
        """
        return [s for s in self._lingering.get(ue, {}).values() if not s.hidden]

    def session_of(self, ue: str, aisi: str) -> Session | None:
        """Return the live session of a UE with a service; None if there is none."""
        return self._current.get((ue, aisi))

    def session_of_key(self, key: str) -> Session | None:
        """Return the session that was granted under an idempotency key."""
        return self._by_key.get(key)

    def at_anchor(self, anchor: str) -> list[Lease]:
        """Return the live leases at an anchor."""
        return [self._leases[lease_id] for lease_id in self._by_anchor.get(anchor, ())]

    def leases_of(self, session: Session) -> list[Lease]:
        """Return a session's leases, oldest first."""
        return [self._leases[lease_id] for lease_id in session.lease_ids]

    def leases_beside(self, lease_id: str) -> list[Lease]:
        """Return the leases of a lease's session, itself among them, oldest first. KeyError."""
        return self.leases_of(self._sessions[self._leases[lease_id].terms.session_id])

    def in_state(self, session: Session, state: State) -> list[Lease]:
        """Return a session's leases in a state, oldest first."""
        return [lease for lease in self.leases_of(session) if lease.state is state]

    def committed(self, session: Session) -> Lease | None:
        """Return the lease that steers a session now; None if there is none."""
        return next(reversed(self.in_state(session, State.COMMITTED)), None)

    def next_epoch(self, ue: str, aisi: str) -> int:
        """Return an epoch above every earlier one of this UE and service (fencing)."""
        return self._epochs.get(_fenced(ue, aisi), 0) + 1

    # Quotas count what is on its way, as pools do

    def expect(self, terms: Terms) -> None:
        """Count a session that is to be prepared among what its tenant holds."""
        session = self._sessions.get(terms.session_id)
        if session is None or not session.live:
            self._expected.add(terms.session_id)
            self._count(terms, 1)

    def expect_no_more(self, terms: Terms) -> None:
        """Take a session off that was not prepared after all."""
        if terms.session_id in self._expected:
            self._expected.remove(terms.session_id)
            self._count(terms, -1)

    # Changes

    def fold(self, event: Record, at_ns: int) -> None:
        """Let a durable event take effect. `at_ns`: when it happened, CLOCK_MONOTONIC."""
        match event:
            case Prepared():
                self._prepared(event, at_ns)
            case Committed() | Renewed() | DrainStarted():
                lease = self._evolve(event, at_ns)
                session = self._sessions[lease.terms.session_id]
                if session.started_ns is None:
                    session.started_ns = at_ns
                    if session.key is not None:
                        self._by_key[session.key] = session
            case Ended():
                self._end(event, at_ns)
            case UeMoved(ue, cell):
                self.cells[ue] = cell
                for session in self.sessions(ue=ue):
                    self.pools.move_cell(session.session_id, cell)
            case PolicySet(tenant, policy):
                self.policies[tenant] = policy
            case Started() | Acknowledged() | UplinkHeld() | UplinkResumed():
                pass
            case _:
                self.fleet.fold(event)

    def forget(self, now_ns: int) -> None:
        """Drop sessions that ended too long ago, or too many of them."""
        while self._ended and (
            len(self._ended) > MAX_RETAINED or (self._ended[0].ended_ns or 0) <= now_ns - RETAIN_NS
        ):
            session = self._ended.popleft()
            if session.live or self._sessions.get(session.session_id) is not session:
                continue  # it began anew (break-before-make), or is forgotten already
            for lease_id in session.lease_ids:
                del self._leases[lease_id]
            del self._sessions[session.session_id]
            _discard(self._lingering, session.ue, session.session_id)
            self._forget_key(session)

    def _evolve(self, event: Committed | Renewed | DrainStarted, at_ns: int) -> Lease:
        lease = evolve(self._leases[event.lease_id], event)
        self._leases[event.lease_id] = lease
        self.deadlines.watch(lease, at_ns)
        return lease

    def _prepared(self, event: Prepared, at_ns: int) -> None:
        terms = event.terms
        session = self._sessions.get(terms.session_id)
        if session is None:
            session = Session(terms.session_id, terms.tenant, terms.ue, terms.aisi, key=terms.key)
            self._sessions[terms.session_id] = session
        if not session.live:
            session.ended_ns = None
            self._current[terms.ue, terms.aisi] = session
            self._by_ue[terms.ue][session.session_id] = session
            self._by_tenant[terms.tenant][session.session_id] = session
            if terms.session_id in self._expected:
                self._expected.remove(terms.session_id)  # it counts already
            else:
                self._count(terms, 1)
            session.counted = terms
        session.live += 1
        session.lease_ids.append(terms.lease_id)
        fenced = _fenced(terms.ue, terms.aisi)
        self._epochs[fenced] = max(self._epochs.get(fenced, 0), terms.epoch)
        if terms.anchor is not None:
            self._by_anchor[terms.anchor].add(terms.lease_id)
        lease = evolve(None, event)
        self._leases[terms.lease_id] = lease
        self.deadlines.watch(lease, at_ns)
        self.pools.hold(terms.lease_id, terms.session_id, demand(terms))

    def _end(self, event: Ended, at_ns: int) -> None:
        lease = evolve(self._leases[event.lease_id], event)
        self._leases[event.lease_id] = lease
        terms = lease.terms
        self.pools.release(terms.lease_id)
        if terms.anchor is not None:
            self._by_anchor[terms.anchor].discard(terms.lease_id)
        session = self._sessions[terms.session_id]
        session.live -= 1
        if not session.live:
            session.ended_ns = at_ns
            del self._current[terms.ue, terms.aisi]
            _discard(self._by_ue, terms.ue, session.session_id)
            _discard(self._by_tenant, terms.tenant, session.session_id)
            assert session.counted is not None
            self._count(session.counted, -1)
            self._ended.append(session)
            if terms.anchor is None and event.reason not in _AS_ASKED:
                self._lingering[terms.ue][session.session_id] = session
            if event.reason is EndReason.NOT_ENFORCED:
                self._forget_key(session)  # the request was refused: it may be made again

    def _forget_key(self, session: Session) -> None:
        if session.key is not None and self._by_key.get(session.key) is session:
            del self._by_key[session.key]

    def _count(self, terms: Terms, sessions: int) -> None:
        """Add a session under these terms to what its tenant holds, or (-1) take it off."""
        held = self._held.get(terms.tenant)
        if held is None:
            held = self._held[terms.tenant] = Held()
        held.sessions += sessions
        held.downlink_bps += sessions * terms.downlink_bps
        held.uplink_bps += sessions * terms.uplink_bps


def _fenced(ue: str, aisi: str) -> tuple[str, str]:
    """Return whose epochs grow together; those of QoS alone, since they may share servers."""
    return ue, QOS_ALONE if aisi.startswith(QOS_ALONE) else aisi


def _discard(index: defaultdict[str, dict[str, Session]], of: str, session_id: str) -> None:
    index[of].pop(session_id, None)
    if not index[of]:
        del index[of]
