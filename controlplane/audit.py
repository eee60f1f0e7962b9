"""What a third party checks in an evidence log: that every lease kept the rules.

Pure functions over entries, written against the rules alone: nothing here uses the state machine
that made the entries (`lease`). `Auditor.add` takes entry after entry, `finish` says what is only
known at the end. Instants are Unix ns. Entries with one `at`, one after the other, are one write:
all of them became durable together.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from controlplane.clock import rfc3339
from controlplane.entries import Entry
from controlplane.facts import Acknowledged, PolicySet, Started
from controlplane.fleet import AnchorFailed, AnchorRecovered
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Prepared,
    Renewed,
    State,
    Terms,
)
from controlplane.rules import (
    AT_DEADLINE,
    CLOSING_NS,
    LATE_NS,
    PAGE,
    REASONS,
    SLACK_NS,
    Counts,
    Finding,
    Rule,
)

Found = Iterator[tuple[Rule, str]]
LeaseEvent = Committed | Renewed | DrainStarted | Ended


@dataclass(slots=True)
class _Lease:
    """A lease that has not ended."""

    terms: Terms
    index: int  # of the last entry about it
    prepared_at_ns: int
    state: State
    deadline_ns: int
    committed_at_ns: int = 0


@dataclass(slots=True)
class _Session:
    whose: tuple[str, str, str]  # UE, service, tenant
    live: int = 0  # leases
    granted: bool = False  # it has had a COMMIT
    revoked: bool = False  # and what ended last was taken back by the operator


@dataclass(slots=True)
class _Flip:
    """A new lease beside a committed one of its session, which must give way in the same write."""

    index: int
    old: _Lease


@dataclass(slots=True)
class _Write:
    """What the entries of one write have shown so far."""

    at_ns: int
    flips: list[_Flip] = field(default_factory=list)
    preempted: list[tuple[int, Terms]] = field(default_factory=list)
    granted: list[Terms] = field(default_factory=list)


class Auditor:
    """Checks entries in the order of the log."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._live: dict[str, _Lease] = {}
        self._ended: dict[str, int] = {}  # lease id -> index of its end
        self._of_ue: defaultdict[str, dict[str, _Lease]] = defaultdict(dict)  # live
        self._sessions: dict[str, _Session] = {}
        self._current: dict[tuple[str, str], str] = {}  # session id, by UE and service
        self._epochs: dict[tuple[str, str], int] = {}
        self._failed: dict[str, tuple[int, bool]] = {}  # anchor -> when last, and if it still is
        self._policies: set[str] = set()  # tenants that were given one
        self._started_ns = 0  # when the controller that wrote this took over
        self._write = _Write(0)
        self._last_index = -1

    def add(self, entry: Entry) -> list[Finding]:
        """Return what is wrong with the next entry, or with the write that it shows to be over."""
        event, at_ns = entry.event, entry.at_ns
        findings: list[Finding] = []
        if at_ns != self._write.at_ns:
            findings = self._settle()
            if at_ns < self._write.at_ns and not isinstance(event, Started):
                before = rfc3339(self._write.at_ns)
                findings.append(Finding(entry.index, Rule.TIME_GOES_ON, f"it was {before} before"))
            self._write = _Write(at_ns)
        self.counts.entries += 1
        self._last_index = entry.index
        match event:
            case Prepared():
                found = self._prepared(entry, event)
            case Committed() | Renewed() | DrainStarted() | Ended():
                found = self._later(entry, event)
            case Acknowledged():
                found = self._acknowledged(entry, event)
            case _:
                self._note(event, at_ns)
                return findings
        findings += [Finding(entry.index, rule, detail) for rule, detail in found]
        return findings

    def finish(self) -> list[Finding]:
        """Return what is missing at the end of the log."""
        findings = self._settle()
        for lease_id, lease in self._live.items():
            if self._due(lease) + LATE_NS <= self._write.at_ns:
                detail = f"lease {lease_id} was over at {rfc3339(lease.deadline_ns)}; no end of it"
                findings.append(Finding(lease.index, Rule.ENDED_IN_TIME, detail))
        self.counts.open_leases = tuple(self._live)
        return findings

    # Facts

    def _note(self, event: object, at_ns: int) -> None:
        match event:
            case Started():
                self._started_ns = at_ns
                self.counts.starts += 1
            case AnchorFailed(name, _):
                self._failed[name] = at_ns, True
            case AnchorRecovered(name) if name in self._failed:
                self._failed[name] = self._failed[name][0], False
            case PolicySet(tenant, _):
                self._policies.add(tenant)

    def _acknowledged(self, entry: Entry, event: Acknowledged) -> Found:
        when = rfc3339(event.acknowledged_ns)
        if event.acknowledged_ns > entry.at_ns:
            yield Rule.TIME_GOES_ON, f"acknowledged at {when}, which is not yet"
        for lease_id in event.lease_ids:
            lease = self._live.get(lease_id)
            if lease is None:
                ended = self._ended.get(lease_id)
                why = "was never prepared" if ended is None else f"ended with entry {ended}"
                yield Rule.ENFORCED_AFTER_COMMIT, f"lease {lease_id} {why}"
            elif lease.state is not State.COMMITTED:
                yield Rule.ENFORCED_AFTER_COMMIT, f"lease {lease_id} is {lease.state}"
            elif event.acknowledged_ns < lease.committed_at_ns:
                detail = f"lease {lease_id} was enforced at {when}, before its COMMIT"
                yield Rule.ENFORCED_AFTER_COMMIT, detail
            elif event.acknowledged_ns >= lease.deadline_ns + SLACK_NS:
                detail = f"enforced at {when}; lease {lease_id} {_was_over(lease)}"
                yield Rule.NOT_AFTER_EXPIRY, detail

    # The life of a lease

    def _prepared(self, entry: Entry, event: Prepared) -> Found:
        terms = event.terms
        lease_id, pair = terms.lease_id, (terms.ue, terms.aisi)
        if lease_id in self._live or lease_id in self._ended:
            yield Rule.PREPARED_ONCE, f"lease {lease_id} exists"
            return
        last = self._epochs.get(pair, 0)
        if terms.epoch <= last:
            detail = f"epoch {terms.epoch} of {' with '.join(pair)} is not above {last}"
            yield Rule.EPOCH_GROWS, detail
        self._epochs[pair] = max(terms.epoch, last)
        whose = (*pair, terms.tenant)
        session = self._sessions.get(terms.session_id)
        if session is None:
            session = self._sessions[terms.session_id] = _Session(whose)
        if session.whose != whose:
            ue, aisi, tenant = session.whose
            detail = f"session {terms.session_id} is {tenant}'s, of {ue} with {aisi}"
            yield Rule.ONE_SESSION, detail
        current = self._current.get(pair, terms.session_id)
        if current != terms.session_id and self._sessions[current].live:
            yield Rule.ONE_SESSION, f"{' with '.join(pair)} has session {current}"
        self._current[pair] = terms.session_id
        lease = _Lease(terms, entry.index, entry.at_ns, State.PREPARED, event.prepare_until_ns)
        self._live[lease_id] = self._of_ue[terms.ue][lease_id] = lease
        session.live += 1
        self.counts.leases += 1
        self.counts.sessions = len(self._sessions)

    def _later(self, entry: Entry, event: LeaseEvent) -> Found:
        lease, name = self._live.get(event.lease_id), f"lease {event.lease_id}"
        if lease is None:
            if event.lease_id in self._ended:
                ended = self._ended[event.lease_id]
                yield Rule.ENDED_IS_FINAL, f"{name} ended with entry {ended}"
            else:
                yield Rule.PREPARED_FIRST, f"{name} was never prepared"
            return
        lease.index = entry.index
        if isinstance(event, Ended):
            yield from self._end(entry, lease, event)
            return
        if entry.at_ns >= lease.deadline_ns + SLACK_NS:
            yield Rule.NOT_AFTER_EXPIRY, f"{name} {_was_over(lease)}"
        match event:
            case Committed(_, until_ns):
                yield from self._committed(entry, lease, until_ns)
            case Renewed(_, until_ns):
                if lease.state is not State.COMMITTED:
                    yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}, it has no COMMIT"
                if until_ns < lease.deadline_ns:
                    yield Rule.RENEWAL_GROWS, f"{name} ran until {rfc3339(lease.deadline_ns)}"
                lease.deadline_ns = until_ns
            case DrainStarted(_, until_ns):
                if lease.state is not State.COMMITTED:
                    yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}, it steers nothing"
                if until_ns > lease.deadline_ns:
                    ran = rfc3339(lease.deadline_ns)
                    yield Rule.DRAIN_WITHIN_LEASE, f"{name} ran until {ran}"
                if self._gives_way(lease):
                    self.counts.relocations += 1
                else:
                    detail = f"{name} drains, and no lease granted in this write takes over"
                    yield Rule.MAKE_BEFORE_BREAK, detail
                lease.state, lease.deadline_ns = State.DRAINING, until_ns

    def _committed(self, entry: Entry, lease: _Lease, until_ns: int) -> Found:
        terms = lease.terms
        name, session = f"lease {terms.lease_id}", self._sessions[terms.session_id]
        if lease.state is not State.PREPARED:
            yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}"
        if until_ns <= entry.at_ns - SLACK_NS:
            yield Rule.NOT_AFTER_EXPIRY, f"{name} was granted until {rfc3339(until_ns)}"
        steering = [
            old for old in self._leases_of(terms, State.COMMITTED) if old is not lease
        ]
        for old in steering:
            self._write.flips.append(_Flip(entry.index, old))
            if until_ns > old.deadline_ns:
                ran = rfc3339(old.deadline_ns)
                yield Rule.KEEPS_DEADLINE, f"lease {old.terms.lease_id} ran until {ran}"
        if session.granted and not steering and lease.state is State.PREPARED:
            self.counts.breaks += 1
            if not session.revoked:
                detail = f"session {terms.session_id} had no lease from which it could move"
                yield Rule.NO_GAP, detail
        session.granted = True
        self._write.granted.append(terms)
        lease.state, lease.deadline_ns = State.COMMITTED, until_ns
        lease.committed_at_ns = entry.at_ns

    def _end(self, entry: Entry, lease: _Lease, event: Ended) -> Found:
        terms, reason = lease.terms, event.reason
        name = f"lease {terms.lease_id}"
        if reason not in REASONS[lease.state]:
            yield Rule.END_REASON, f"{name} is {lease.state}: it cannot end {reason}"
        elif reason in AT_DEADLINE and entry.at_ns < lease.deadline_ns:
            ran = rfc3339(lease.deadline_ns)
            yield Rule.END_REASON, f"{name} ran until {ran}: it had not {reason} yet"
        elif (missing := self._missing(lease, reason)) is not None:
            yield Rule.END_REASON, f"{name} ended {reason}, and {missing}"
        if entry.at_ns > self._due(lease) + LATE_NS:
            yield Rule.ENDED_IN_TIME, f"{name} {_was_over(lease)}"
        yield from self._closing_counts(entry, lease, event)
        if reason is EndReason.PREEMPTED:
            self.counts.preemptions += 1
            self._write.preempted.append((entry.index, terms))
            if not terms.preemptible:
                yield Rule.PREEMPTION, f"{name} is not preemptible"
        if reason is EndReason.ANCHOR_FAILED and self._gives_way(lease):
            self.counts.recoveries += 1
        if reason is EndReason.REPAGED:
            self.counts.repages += 1
        session = self._sessions[terms.session_id]
        session.live -= 1
        session.revoked = reason is EndReason.REVOKED
        del self._live[terms.lease_id], self._of_ue[terms.ue][terms.lease_id]
        if not self._of_ue[terms.ue]:
            del self._of_ue[terms.ue]
        self._ended[terms.lease_id] = entry.index

    def _missing(self, lease: _Lease, reason: EndReason) -> str | None:
        """Return what the log does not show, and would if the reason were true."""
        terms = lease.terms
        match reason:
            case EndReason.ANCHOR_FAILED if lease.state is State.COMMITTED:
                failed_ns, still = self._failed.get(terms.anchor or "", (0, False))
                if not still and failed_ns < lease.prepared_at_ns:
                    return f"{terms.anchor} has not failed since it was prepared"
            case EndReason.POLICY if terms.tenant not in self._policies:
                return f"{terms.tenant} was given no policy"
            case EndReason.REPAGED:
                others = self._of_ue[terms.ue].values()
                if not any(_takes_over(other, lease) for other in others):
                    return f"{terms.ue} has been paged to no other service"
        return None

    def _closing_counts(self, entry: Entry, lease: _Lease, event: Ended) -> Found:
        name, counted_ns = f"lease {lease.terms.lease_id}", event.counted_ns
        if lease.state is State.PREPARED:
            if event.usage is not None:
                yield Rule.ENFORCED_AFTER_COMMIT, f"{name} has no COMMIT, but has carried packets"
            return
        if event.usage is None:
            # What was over before a controller took over, the kernel has no counts of any more.
            alone = lease.committed_at_ns < self._started_ns > lease.deadline_ns - SLACK_NS
            if event.reason is not EndReason.NOT_ENFORCED and not alone:
                yield Rule.CLOSING_COUNTS, f"{name} ended {event.reason}, without its counts"
            return
        over_ns = min(entry.at_ns, lease.deadline_ns)
        if not lease.committed_at_ns <= counted_ns <= entry.at_ns:
            detail = f"those of {name} are of {rfc3339(counted_ns)}, outside its life"
            yield Rule.CLOSING_COUNTS, detail
        elif counted_ns < over_ns - CLOSING_NS:
            yield Rule.CLOSING_COUNTS, f"those of {name} are of {rfc3339(counted_ns)}, long before"
        elif counted_ns >= lease.deadline_ns + SLACK_NS:
            detail = f"the kernel had {name} at {rfc3339(counted_ns)}; it {_was_over(lease)}"
            yield Rule.NOT_AFTER_EXPIRY, detail

    # Help

    def _leases_of(self, terms: Terms, state: State) -> list[_Lease]:
        """Return the live leases of a session in a state."""
        return [
            lease
            for lease in self._of_ue[terms.ue].values()
            if lease.state is state and lease.terms.session_id == terms.session_id
        ]

    def _due(self, lease: _Lease) -> int:
        """Return from when on there was a controller that could end it."""
        return max(lease.deadline_ns, self._started_ns)

    def _gives_way(self, lease: _Lease) -> bool:
        """Whether a lease granted in this write takes its place; that is settled then."""
        flips = self._write.flips
        remaining = [flip for flip in flips if flip.old is not lease]
        self._write.flips = remaining
        return len(remaining) < len(flips)

    def _settle(self) -> list[Finding]:
        """Return what the write that is over lacks."""
        write, findings = self._write, []
        for flip in write.flips:
            detail = f"lease {flip.old.terms.lease_id} did not give way in the same write"
            findings.append(Finding(flip.index, Rule.MAKE_BEFORE_BREAK, detail))
        for index, lost in write.preempted:
            if all(terms.priority_level >= lost.priority_level for terms in write.granted):
                detail = f"nothing above priority {lost.priority_level} was granted in this write"
                findings.append(Finding(index, Rule.PREEMPTION, detail))
        return findings


def audit(entries: Iterable[Entry]) -> tuple[Counts, list[Finding]]:
    """Check a whole log."""
    auditor = Auditor()
    findings = [finding for entry in entries for finding in auditor.add(entry)]
    findings += auditor.finish()
    return auditor.counts, findings


def _was_over(lease: _Lease) -> str:
    return f"was over at {rfc3339(lease.deadline_ns)}"


def _takes_over(other: _Lease, lease: _Lease) -> bool:
    """Whether the UE was paged for anew because its session could not go on."""
    terms = other.terms
    return (
        other.state is State.COMMITTED
        and terms.session_id != lease.terms.session_id
        and terms.tenant == lease.terms.tenant
        and terms.cause != PAGE
        and other.committed_at_ns >= lease.committed_at_ns
    )
