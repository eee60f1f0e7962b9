"""What a third party checks in an evidence log: that every lease kept the rules.

Pure functions over entries, written against the rules alone: nothing here uses the state machine
that made the entries (`lease`). `Auditor.add` takes entry after entry, `finish` says what is only
known at the end. Instants are Unix ns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from controlplane.clock import NS_PER_MS, rfc3339
from controlplane.entries import Entry
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

# An entry is stamped just after the decision that it records, and may wait for a CPU in between.
SLACK_NS = 50 * NS_PER_MS
# How long after its deadline a lease may still lack its end: the kernel needs nobody to close it.
LATE_NS = 2_000 * NS_PER_MS


class Rule(StrEnum):
    """What a log must show; the value names the rule in findings."""

    PREPARED_ONCE = "prepared-once"  # a lease id is used once
    PREPARED_FIRST = "prepared-first"  # nothing happens to a lease that was never prepared
    COMMIT_AFTER_PREPARE = "commit-after-prepare"  # and once, and within its time limit
    EPOCH_GROWS = "epoch-grows"  # per UE and service
    ONE_SESSION = "one-session"  # per UE and service at a time; a session is of one such pair
    MAKE_BEFORE_BREAK = "make-before-break"  # new lease and drain of the old in one write
    DRAIN_WITHIN_LEASE = "drain-within-lease"
    KEEPS_DEADLINE = "keeps-deadline"  # a relocation does not lengthen what was granted
    NOT_AFTER_EXPIRY = "not-after-expiry"  # no renewal, no drain, no commit for the past
    RENEWAL_GROWS = "renewal-grows"  # renewal never shortens
    END_REASON = "end-reason"  # one that the lease's state allows, and not before its time
    ENDED_IS_FINAL = "ended-is-final"
    ENDED_IN_TIME = "ended-in-time"  # what should be over at the end of the log has its end there


REASONS = {
    State.PREPARED: {EndReason.ABORTED, EndReason.PREPARE_TIMED_OUT, EndReason.NOT_ENFORCED},
    State.COMMITTED: {
        *(EndReason.EXPIRED, EndReason.RELEASED, EndReason.REVOKED, EndReason.NOT_ENFORCED),
    },
    State.DRAINING: {
        *(EndReason.RELOCATED, EndReason.RELEASED, EndReason.REVOKED, EndReason.NOT_ENFORCED),
    },
}
AT_DEADLINE = {EndReason.PREPARE_TIMED_OUT, EndReason.EXPIRED, EndReason.RELOCATED}


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that an entry breaks."""

    index: int
    rule: Rule
    detail: str


@dataclass(slots=True)
class Counts:
    """What the log tells of, as far as it was read."""

    entries: int = 0
    leases: int = 0
    sessions: int = 0
    relocations: int = 0  # make-before-break
    open_leases: tuple[str, ...] = ()  # at the end of the log; they may still run


@dataclass(slots=True)
class _Lease:
    terms: Terms
    index: int  # of the last entry about it
    state: State
    deadline_ns: int


@dataclass(slots=True)
class _Session:
    pair: tuple[str, str]
    live: dict[str, _Lease] = field(default_factory=dict)  # by lease id


@dataclass(slots=True)
class _Flip:
    """A new lease beside a committed one, until the old one's drain is seen."""

    index: int
    at_ns: int
    old: _Lease


class Auditor:
    """Checks entries in the order of the log."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._leases: dict[str, _Lease] = {}
        self._sessions: dict[str, _Session] = {}
        self._current: dict[tuple[str, str], str] = {}  # session id, by UE and service
        self._epochs: dict[tuple[str, str], int] = {}
        self._flips: dict[str, _Flip] = {}  # by id of the new lease
        self._last = Entry(-1, 0, Ended("", EndReason.ABORTED))

    def add(self, entry: Entry) -> list[Finding]:
        """Return what is wrong with the next entry."""
        self.counts.entries += 1
        self._last = entry
        if isinstance(entry.event, Prepared):
            found = self._prepared(entry, entry.event)
        else:
            found = self._later(entry, entry.event)
        return [Finding(entry.index, rule, detail) for rule, detail in found]

    def finish(self) -> list[Finding]:
        """Return what is missing at the end of the log."""
        findings = []
        open_leases = []
        for lease_id, lease in self._leases.items():
            if lease.state is State.ENDED:
                continue
            open_leases.append(lease_id)
            if lease.deadline_ns + LATE_NS <= self._last.at_ns:
                detail = f"lease {lease_id} was over at {rfc3339(lease.deadline_ns)}; no end of it"
                findings.append(Finding(lease.index, Rule.ENDED_IN_TIME, detail))
        for flip in self._flips.values():
            if flip.index != self._last.index:  # else a crash cut the write: never enforced
                detail = f"the drain of lease {flip.old.terms.lease_id} is missing"
                findings.append(Finding(flip.index, Rule.MAKE_BEFORE_BREAK, detail))
        self.counts.open_leases = tuple(open_leases)
        return findings

    def _prepared(self, entry: Entry, event: Prepared) -> Iterator[tuple[Rule, str]]:
        terms, pair = event.terms, (event.terms.ue, event.terms.aisi)
        whose = f"{terms.ue} with {terms.aisi}"
        if terms.lease_id in self._leases:
            yield Rule.PREPARED_ONCE, f"lease {terms.lease_id} exists"
            return
        if terms.epoch <= self._epochs.get(pair, 0):
            yield (
                Rule.EPOCH_GROWS,
                f"epoch {terms.epoch} of {whose} is not above {self._epochs[pair]}",
            )
        session = self._sessions.setdefault(terms.session_id, _Session(pair))
        if session.pair != pair:
            yield (
                Rule.ONE_SESSION,
                f"session {terms.session_id} is of {' with '.join(session.pair)}",
            )
        current = self._current.get(pair, terms.session_id)
        if current != terms.session_id and self._sessions[current].live:
            yield Rule.ONE_SESSION, f"{whose} has session {current}"
        lease = _Lease(terms, entry.index, State.PREPARED, event.prepare_until_ns)
        self._leases[terms.lease_id] = session.live[terms.lease_id] = lease
        self._current[pair] = terms.session_id
        self._epochs[pair] = max(terms.epoch, self._epochs.get(pair, 0))
        self.counts.leases += 1
        self.counts.sessions = len(self._sessions)

    def _later(
        self, entry: Entry, event: Committed | Renewed | DrainStarted | Ended
    ) -> Iterator[tuple[Rule, str]]:
        lease, name = self._leases.get(event.lease_id), f"lease {event.lease_id}"
        if lease is None:
            yield Rule.PREPARED_FIRST, f"{name} was never prepared"
            return
        if lease.state is State.ENDED:
            yield Rule.ENDED_IS_FINAL, f"{name} ended with entry {lease.index}"
            return
        if not isinstance(event, Ended) and entry.at_ns >= lease.deadline_ns + SLACK_NS:
            yield Rule.NOT_AFTER_EXPIRY, f"{name} was over at {rfc3339(lease.deadline_ns)}"
        flip = self._flips.get(event.lease_id)
        if flip and not (isinstance(event, Ended) and event.reason is EndReason.NOT_ENFORCED):
            detail = f"entry {flip.index}: the drain of lease {flip.old.terms.lease_id} is missing"
            yield Rule.MAKE_BEFORE_BREAK, detail
        self._flips.pop(event.lease_id, None)
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
                yield from self._drain_started(entry, lease, until_ns)
            case Ended(_, reason):
                if reason not in REASONS[lease.state]:
                    yield Rule.END_REASON, f"{name} is {lease.state}: it cannot end {reason}"
                elif reason in AT_DEADLINE and entry.at_ns < lease.deadline_ns:
                    ran = rfc3339(lease.deadline_ns)
                    yield Rule.END_REASON, f"{name} ran until {ran}: it had not {reason} yet"
                lease.state = State.ENDED
                self._sessions[lease.terms.session_id].live.pop(event.lease_id, None)
        lease.index = entry.index

    def _committed(self, entry: Entry, lease: _Lease, until_ns: int) -> Iterator[tuple[Rule, str]]:
        lease_id = lease.terms.lease_id
        if lease.state is not State.PREPARED:
            yield Rule.COMMIT_AFTER_PREPARE, f"lease {lease_id} is {lease.state}"
        if until_ns <= entry.at_ns - SLACK_NS:
            yield Rule.NOT_AFTER_EXPIRY, f"lease {lease_id} was granted until {rfc3339(until_ns)}"
        for old in self._sessions[lease.terms.session_id].live.values():
            if old is lease or old.state is not State.COMMITTED:
                continue
            self._flips[lease_id] = _Flip(entry.index, entry.at_ns, old)
            if until_ns > old.deadline_ns:
                ran = rfc3339(old.deadline_ns)
                yield Rule.KEEPS_DEADLINE, f"lease {old.terms.lease_id} ran until {ran}"
        lease.state, lease.deadline_ns = State.COMMITTED, until_ns

    def _drain_started(
        self, entry: Entry, lease: _Lease, until_ns: int
    ) -> Iterator[tuple[Rule, str]]:
        name = f"lease {lease.terms.lease_id}"
        if lease.state is not State.COMMITTED:
            yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}, it steers nothing"
        if until_ns > lease.deadline_ns:
            yield Rule.DRAIN_WITHIN_LEASE, f"{name} ran until {rfc3339(lease.deadline_ns)}"
        flips = {new: flip for new, flip in self._flips.items() if flip.old is lease}
        if not flips:
            yield Rule.MAKE_BEFORE_BREAK, f"{name} drains, and no lease of its session takes over"
        for new, flip in flips.items():
            if flip.at_ns != entry.at_ns or flip.index != entry.index - 1:
                detail = f"{name} drains, but lease {new} took over with entry {flip.index}"
                yield Rule.MAKE_BEFORE_BREAK, f"{detail}, at {rfc3339(flip.at_ns)}"
            del self._flips[new]
            self.counts.relocations += 1
        lease.state, lease.deadline_ns = State.DRAINING, until_ns


def audit(entries: Iterable[Entry]) -> tuple[Counts, list[Finding]]:
    """Check a whole log."""
    auditor = Auditor()
    findings = [finding for entry in entries for finding in auditor.add(entry)]
    findings += auditor.finish()
    return auditor.counts, findings
