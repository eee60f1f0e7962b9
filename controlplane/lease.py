"""The COMMIT: an admission lease as a pure state machine.

`step(lease, command, now)` looks the pair (state, command) up in one table and returns the next
lease, the events to journal and the effects to carry out, or raises. It does no I/O and reads no
clock. `evolve` folds an event into a lease, so that a journal rebuilds every lease.

                  commit            supersede            tick
    --> PREPARED --------> COMMITTED ---------> DRAINING --------------> ENDED
            |                 | tick, release, revoke, fail   | release, revoke, fail
            `-- abort, tick --+-------------------------------+--> ENDED (with its reason)

Duties of the caller, in this order: make the events durable, then carry out the effects, then
answer (evidence first).
"""

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum

from controlplane.enforcement import Binding, Flow, Usage
from controlplane.five_qi import BEST_EFFORT, qos_flow
from controlplane.intent import Intent
from controlplane.values import value


class State(StrEnum):
    """Where a lease is in its life."""

    PREPARED = "PREPARED"
    COMMITTED = "COMMITTED"
    DRAINING = "DRAINING"
    ENDED = "ENDED"


class EndReason(StrEnum):
    """Why a lease ended."""

    ABORTED = "ABORTED"  # rolled back before COMMIT
    PREPARE_TIMED_OUT = "PREPARE_TIMED_OUT"
    EXPIRED = "EXPIRED"
    RELEASED = "RELEASED"  # by its UE
    REVOKED = "REVOKED"  # by the operator
    RELOCATED = "RELOCATED"  # superseded by a lease at another anchor, and drained
    REPAGED = "REPAGED"  # no anchor of its service was left; another session took over
    PREEMPTED = "PREEMPTED"  # its capacity went to a lease of higher priority (ARP)
    ANCHOR_FAILED = "ANCHOR_FAILED"  # its anchor died
    POLICY = "POLICY"  # its tenant's policy does not allow it any more
    CELL_FULL = "CELL_FULL"  # the cell that its UE has moved to has no room for it
    NOT_ENFORCED = "NOT_ENFORCED"  # the user plane could not be brought to it


# Those with which the network, not its UE, may take a lease back.
TAKEN_BACK = (
    *(EndReason.REVOKED, EndReason.REPAGED, EndReason.PREEMPTED),
    *(EndReason.ANCHOR_FAILED, EndReason.POLICY, EndReason.CELL_FULL),
)


@value(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a lease is about; fixed when it is prepared.

    Without an anchor it is about QoS alone, towards servers that the application knows.
    """

    lease_id: str
    session_id: str
    cause: str  # what asked for it: PAGE, or the trigger of a relocation
    tenant: str
    ue: str  # UE identity
    aisi: str
    anchor: str | None
    flows: tuple[Flow, ...]
    epoch: int
    qos_profile: str
    cell: str | None  # whose capacity it shares
    downlink_bps: int  # GFBR: reserved in the cell and on N6
    uplink_bps: int
    priority_level: int  # ARP (TS 23.501, 5.7.2.2): 1 to 15, 1 is the most important
    preemptible: bool  # pre-emption vulnerability
    five_qi: int = BEST_EFFORT
    max_downlink_bps: int | None = None  # MFBR; None: no limit
    max_uplink_bps: int | None = None
    intent: Intent | None = None  # of a page
    request: str | None = None  # canonical JSON of a request for QoS alone, without credentials
    key: str | None = None  # idempotency key, hashed with its tenant


@value(frozen=True, slots=True, kw_only=True)
class Lease:
    """One COMMIT. Instants are CLOCK_MONOTONIC ns."""

    terms: Terms
    state: State
    deadline_ns: int  # of the present state: prepare time-out, expiry, or end of drain
    end_reason: EndReason | None = None
    usage: Usage | None = None  # closing counts

    def binding(self) -> Binding:
        """Return what this lease authorises in the user plane."""
        terms = self.terms
        return Binding(
            lease_id=terms.lease_id,
            epoch=terms.epoch,
            flows=terms.flows,
            anchor=terms.anchor,
            qos=qos_flow(
                terms.five_qi,
                terms.downlink_bps,
                terms.uplink_bps,
                terms.max_downlink_bps,
                terms.max_uplink_bps,
            ),
            expires_ns=self.deadline_ns,
        )


# Commands


@value(frozen=True, slots=True)
class Commit:
    """Grant the prepared lease until `expires_ns`."""

    expires_ns: int


@value(frozen=True, slots=True)
class Renew:
    """Extend a committed lease to `expires_ns`; never shortens."""

    expires_ns: int


@value(frozen=True, slots=True)
class Supersede:
    """Another lease of the session has been committed: drain until `drain_until_ns`."""

    drain_until_ns: int


@value(frozen=True, slots=True)
class Release:
    """The UE is done."""


@value(frozen=True, slots=True)
class Revoke:
    """The network takes the lease back, for a reason among TAKEN_BACK."""

    reason: EndReason = EndReason.REVOKED


@value(frozen=True, slots=True)
class Fail:
    """The user plane could not be brought to what the lease says."""


@value(frozen=True, slots=True)
class Abort:
    """Roll a prepared lease back."""


@value(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Command = Commit | Renew | Supersede | Release | Revoke | Fail | Abort | Tick


# Events: what is journalled


@value(frozen=True, slots=True)
class Prepared:
    """What these terms need is reserved: an anchor's slot, and bandwidth."""

    terms: Terms
    prepare_until_ns: int


@value(frozen=True, slots=True)
class Committed:
    """The lease is granted."""

    lease_id: str
    expires_ns: int


@value(frozen=True, slots=True)
class Renewed:
    """The lease is extended."""

    lease_id: str
    expires_ns: int


@value(frozen=True, slots=True)
class DrainStarted:
    """The lease steers nothing new; what is under way may finish."""

    lease_id: str
    until_ns: int


@value(frozen=True, slots=True)
class Ended:
    """The lease is over.

    `usage` is what the kernel had counted at `counted_ns`; None if it could not be read any more.
    """

    lease_id: str
    reason: EndReason
    usage: Usage | None = None
    counted_ns: int = 0


Event = Prepared | Committed | Renewed | DrainStarted | Ended


class Effect(StrEnum):
    """What the caller must do once the events are durable."""

    OPEN = "OPEN"  # the user plane of this lease
    EXTEND = "EXTEND"  # its deadline
    DRAIN = "DRAIN"  # keep the old anchor's answers until the deadline
    CLOSE = "CLOSE"  # the user plane of this lease
    END_DRAIN = "END_DRAIN"
    FREE = "FREE"  # what it had reserved


class LeaseError(Exception):
    """A command that the lease's state does not allow. The lease is unchanged."""

    def __init__(self, lease: Lease, command: Command, why: str) -> None:
        self.lease_id = lease.terms.lease_id
        self.state = lease.state
        self.command = command
        super().__init__(
            f"lease {self.lease_id} is {lease.state}: {type(command).__name__.lower()} {why}"
        )


@value(frozen=True, slots=True)
class Outcome:
    """The result of one step."""

    lease: Lease
    events: tuple[Event, ...] = ()
    effects: tuple[Effect, ...] = ()


def prepare(terms: Terms, prepare_until_ns: int) -> Outcome:
    """Begin a lease: the caller has reserved what it needs, until this instant at the latest."""
    event = Prepared(terms, prepare_until_ns)
    return Outcome(evolve(None, event), (event,))


def step(lease: Lease, command: Command, now_ns: int) -> Outcome:
    """Apply one command. Raises LeaseError where the table has no transition."""
    transition = TRANSITIONS.get((lease.state, type(command)))
    if transition is None:
        raise LeaseError(lease, command, "is not possible in this state")
    return transition(lease, command, now_ns)


def evolve(lease: Lease | None, event: Event) -> Lease:
    """Fold one event into a lease."""
    if isinstance(event, Prepared):
        return Lease(terms=event.terms, state=State.PREPARED, deadline_ns=event.prepare_until_ns)
    if lease is None:
        raise ValueError(f"{type(event).__name__} of a lease that was never prepared")
    match event:
        case Committed(_, expires_ns) | Renewed(_, expires_ns):
            return Lease(terms=lease.terms, state=State.COMMITTED, deadline_ns=expires_ns)
        case DrainStarted(_, until_ns):
            return Lease(terms=lease.terms, state=State.DRAINING, deadline_ns=until_ns)
        case Ended(_, reason, usage, _):
            return replace(lease, state=State.ENDED, end_reason=reason, usage=usage)


def _outcome(lease: Lease, event: Event, *effects: Effect) -> Outcome:
    return Outcome(evolve(lease, event), (event,), effects)


def _commit(lease: Lease, command: Command, now_ns: int) -> Outcome:
    assert isinstance(command, Commit)
    if now_ns >= lease.deadline_ns:
        raise LeaseError(lease, command, "comes after the time limit of its preparation")
    if command.expires_ns <= now_ns:
        raise LeaseError(lease, command, "would already have expired")
    return _outcome(lease, Committed(lease.terms.lease_id, command.expires_ns), Effect.OPEN)


def _renew(lease: Lease, command: Command, now_ns: int) -> Outcome:
    assert isinstance(command, Renew)
    if now_ns >= lease.deadline_ns:
        raise LeaseError(lease, command, "comes after it expired")
    if command.expires_ns < lease.deadline_ns:
        raise LeaseError(lease, command, "would shorten it")
    return _outcome(lease, Renewed(lease.terms.lease_id, command.expires_ns), Effect.EXTEND)


def _supersede(lease: Lease, command: Command, now_ns: int) -> Outcome:
    assert isinstance(command, Supersede)
    if now_ns >= lease.deadline_ns:
        raise LeaseError(lease, command, "comes after it expired")
    until_ns = min(command.drain_until_ns, lease.deadline_ns)  # a drain never outlives its lease
    return _outcome(lease, DrainStarted(lease.terms.lease_id, until_ns), Effect.DRAIN)


Transition = Callable[[Lease, Command, int], Outcome]


def _end(reason: EndReason, *effects: Effect) -> Transition:
    def transition(lease: Lease, command: Command, now_ns: int) -> Outcome:
        return _outcome(lease, Ended(lease.terms.lease_id, reason), *effects, Effect.FREE)

    return transition


def _take_back(*effects: Effect) -> Transition:
    def transition(lease: Lease, command: Command, now_ns: int) -> Outcome:
        assert isinstance(command, Revoke)
        if command.reason not in TAKEN_BACK:
            raise LeaseError(lease, command, f"cannot be for {command.reason}")
        return _end(command.reason, *effects)(lease, command, now_ns)

    return transition


def _at_deadline(then: Transition) -> Transition:
    def transition(lease: Lease, command: Command, now_ns: int) -> Outcome:
        return then(lease, command, now_ns) if now_ns >= lease.deadline_ns else Outcome(lease)

    return transition


def _nothing(lease: Lease, command: Command, now_ns: int) -> Outcome:
    return Outcome(lease)


TRANSITIONS: dict[tuple[State, type[Command]], Transition] = {
    (State.PREPARED, Commit): _commit,
    (State.PREPARED, Abort): _end(EndReason.ABORTED),
    (State.PREPARED, Fail): _end(EndReason.NOT_ENFORCED),
    (State.PREPARED, Tick): _at_deadline(_end(EndReason.PREPARE_TIMED_OUT)),
    (State.COMMITTED, Renew): _renew,
    (State.COMMITTED, Supersede): _supersede,
    (State.COMMITTED, Release): _end(EndReason.RELEASED, Effect.CLOSE),
    (State.COMMITTED, Revoke): _take_back(Effect.CLOSE),
    (State.COMMITTED, Fail): _end(EndReason.NOT_ENFORCED, Effect.CLOSE),
    (State.COMMITTED, Tick): _at_deadline(_end(EndReason.EXPIRED, Effect.CLOSE)),
    (State.DRAINING, Release): _end(EndReason.RELEASED, Effect.END_DRAIN),
    (State.DRAINING, Revoke): _take_back(Effect.END_DRAIN),
    (State.DRAINING, Fail): _end(EndReason.NOT_ENFORCED, Effect.END_DRAIN),
    (State.DRAINING, Tick): _at_deadline(_end(EndReason.RELOCATED, Effect.END_DRAIN)),
    (State.ENDED, Tick): _nothing,
}
