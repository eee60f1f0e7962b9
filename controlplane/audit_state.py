"""What an evidence log has told so far, as an auditor keeps it. Instants are Unix ns."""

from collections import defaultdict
from dataclasses import dataclass, field

from controlplane.facts import PolicySet, Started
from controlplane.fleet import AnchorFailed, AnchorRecovered
from controlplane.lease import EndReason, State, Terms


@dataclass(slots=True)
class LiveLease:
    """A lease that has not ended."""

    terms: Terms
    index: int  # of the last entry about it
    prepared_at_ns: int
    state: State
    deadline_ns: int
    committed_at_ns: int = 0
    drained_at_ns: int = 0  # when it was superseded


@dataclass(slots=True)
class Session:
    """A session, also when it is over."""

    whose: tuple[str, str, str]  # UE, service, tenant
    live: int = 0  # leases
    granted: bool = False  # it has had a COMMIT
    revoked: bool = False  # the last lease that steered it was taken back by the operator


@dataclass(slots=True)
class Flip:
    """A lease granted beside a committed one of its session, which must give way."""

    index: int
    old: LiveLease


@dataclass(slots=True)
class Write:
    """What the entries of one write have shown so far; what is left of it must be settled by it."""

    at_ns: int
    granted: list[Terms] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    preempted: list[tuple[int, Terms]] = field(default_factory=list)

    def gives_way(self, lease: LiveLease) -> bool:
        """Return whether a lease granted in this write takes this one's place; settles that."""
        remaining = [flip for flip in self.flips if flip.old is not lease]
        found = len(remaining) < len(self.flips)
        self.flips = remaining
        return found


class Told:
    """Leases, sessions, and what else reasons refer to."""

    def __init__(self) -> None:
        self.live: dict[str, LiveLease] = {}
        self.ended: dict[str, int] = {}  # lease id -> index of its end
        self.of_ue: defaultdict[str, dict[str, LiveLease]] = defaultdict(dict)  # live
        self.sessions: dict[str, Session] = {}
        self.current: dict[tuple[str, str], str] = {}  # session id, by UE and service
        self.epochs: dict[tuple[str, str], int] = {}
        self.failed_ns: dict[str, int] = {}  # anchor -> when it failed last
        self.dead: set[str] = set()  # anchors that have not recovered
        self.policies: set[str] = set()  # tenants that were given one
        self.started_ns = 0  # when the controller that writes this took over
        self.write = Write(0)

    def note(self, event: object, at_ns: int) -> None:
        """Take a fact."""
        match event:
            case Started():
                self.started_ns = at_ns
            case AnchorFailed(name, _):
                self.failed_ns[name] = at_ns
                self.dead.add(name)
            case AnchorRecovered(name):
                self.dead.discard(name)
            case PolicySet(tenant, _):
                self.policies.add(tenant)

    def begin(self, lease: LiveLease) -> None:
        """Take a new lease of a known session."""
        terms = lease.terms
        self.live[terms.lease_id] = self.of_ue[terms.ue][terms.lease_id] = lease
        self.sessions[terms.session_id].live += 1

    def end(self, lease: LiveLease, reason: EndReason, index: int) -> None:
        """Take the end of a live lease."""
        terms = lease.terms
        session = self.sessions[terms.session_id]
        session.live -= 1
        if lease.state is State.COMMITTED:
            session.revoked = reason is EndReason.REVOKED
        del self.live[terms.lease_id], self.of_ue[terms.ue][terms.lease_id]
        if not self.of_ue[terms.ue]:
            del self.of_ue[terms.ue]
        self.ended[terms.lease_id] = index

    def steering(self, terms: Terms) -> list[LiveLease]:
        """Return the other committed leases of a session."""
        return [
            lease
            for lease in self.of_ue[terms.ue].values()
            if lease.state is State.COMMITTED
            and lease.terms.session_id == terms.session_id
            and lease.terms is not terms
        ]

    def due_ns(self, lease: LiveLease) -> int:
        """Return from when on there was a controller that could end a lease."""
        return max(lease.deadline_ns, self.started_ns)
