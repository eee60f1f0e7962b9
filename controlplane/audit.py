"""What a third party checks in an evidence log: that every lease kept the rules.

Pure functions over entries, written against the rules alone: nothing here uses the state machine
that made the entries (`lease`). `Auditor.add` takes entry after entry, `finish` says what is only
known at the end. Instants are Unix ns. Entries with one `at`, one after the other, are one write:
all of them became durable together.
"""

from collections.abc import Iterable

from controlplane.audit_ends import Found, check_end, was_over
from controlplane.audit_rules import LATE_NS, SLACK_NS, Counts, Finding, Rule
from controlplane.audit_state import Flip, LiveLease, Session, Told, Write
from controlplane.clock import rfc3339
from controlplane.entries import Entry
from controlplane.facts import Acknowledged, Started, UplinkHeld
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Prepared,
    Renewed,
    State,
)

LeaseEvent = Committed | Renewed | DrainStarted | Ended


class Auditor:
    """Checks entries in the order of the log."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._told = Told()

    def add(self, entry: Entry) -> list[Finding]:
        """Return what is wrong with the next entry, or with the write that it shows to be over."""
        event, told, findings = entry.event, self._told, []
        if entry.at_ns != told.write.at_ns:
            findings = self._settle()
            if entry.at_ns < told.write.at_ns and not isinstance(event, Started):
                before = rfc3339(told.write.at_ns)
                findings.append(Finding(entry.index, Rule.TIME_GOES_ON, f"it was {before} before"))
            told.write = Write(entry.at_ns)
        self.counts.entries += 1
        match event:
            case Prepared():
                found = self._prepared(entry, event)
            case Committed() | Renewed() | DrainStarted() | Ended():
                found = self._later(entry, event)
            case Acknowledged():
                found = self._acknowledged(entry, event)
            case UplinkHeld():
                found = self._held(event)
            case _:
                told.note(event, entry.at_ns)
                self.counts.starts += isinstance(event, Started)
                return findings
        findings += [Finding(entry.index, rule, detail) for rule, detail in found]
        return findings

    def finish(self) -> list[Finding]:
        """Return what is missing at the end of the log."""
        told, findings = self._told, self._settle()
        for lease_id, lease in told.live.items():
            if told.due_ns(lease) + LATE_NS <= told.write.at_ns:
                detail = f"lease {lease_id} {was_over(lease)}; no end of it"
                findings.append(Finding(lease.index, Rule.ENDED_IN_TIME, detail))
        self.counts.open_leases = tuple(told.live)
        return findings

    def _settle(self) -> list[Finding]:
        """Return what the write that is over lacks."""
        write, findings = self._told.write, []
        for flip in write.flips:
            detail = f"lease {flip.old.terms.lease_id} did not give way in the same write"
            findings.append(Finding(flip.index, Rule.MAKE_BEFORE_BREAK, detail))
        for index, lost in write.preempted:
            if all(terms.priority_level >= lost.priority_level for terms in write.granted):
                detail = f"nothing of a priority above {lost.priority_level} was granted for it"
                findings.append(Finding(index, Rule.PREEMPTION, detail))
        return findings

    def _acknowledged(self, entry: Entry, event: Acknowledged) -> Found:
        acknowledged_ns, when = event.acknowledged_ns, rfc3339(event.acknowledged_ns)
        if acknowledged_ns > entry.at_ns:
            yield Rule.TIME_GOES_ON, f"acknowledged at {when}, which is later"
        for lease_id in event.lease_ids:
            lease, name = self._told.live.get(lease_id), f"lease {lease_id}"
            if lease is None:
                yield Rule.ENFORCED_AFTER_COMMIT, f"{name} {self._not_live(lease_id)}"
            elif lease.state is not State.COMMITTED:
                yield Rule.ENFORCED_AFTER_COMMIT, f"{name} is {lease.state}"
            elif acknowledged_ns < lease.committed_at_ns:
                yield Rule.ENFORCED_AFTER_COMMIT, f"{name} was at {when}, before its COMMIT"
            elif acknowledged_ns >= lease.deadline_ns + SLACK_NS:
                yield Rule.NOT_AFTER_EXPIRY, f"{name} was enforced at {when}, it {was_over(lease)}"

    def _held(self, event: UplinkHeld) -> Found:
        lease, name = self._told.live.get(event.lease_id), f"lease {event.lease_id}"
        if lease is None or lease.state is not State.COMMITTED:
            yield Rule.ENFORCED_AFTER_COMMIT, f"{name} was held and does not steer"
        elif event.until_ns > lease.deadline_ns:
            when = rfc3339(event.until_ns)
            yield Rule.NOT_AFTER_EXPIRY, f"{name} is held until {when}; it {was_over(lease)}"

    def _prepared(self, entry: Entry, event: Prepared) -> Found:
        told, terms = self._told, event.terms
        pair, session_id = (terms.ue, terms.aisi), terms.session_id
        if terms.lease_id in told.live or terms.lease_id in told.ended:
            yield Rule.PREPARED_ONCE, f"lease {terms.lease_id} exists"
            return
        last = told.epochs.get(pair, 0)
        if terms.epoch <= last:
            detail = f"epoch {terms.epoch} of {' with '.join(pair)} is not above {last}"
            yield Rule.EPOCH_GROWS, detail
        told.epochs[pair] = max(terms.epoch, last)
        session = told.sessions.get(session_id)
        if session is None:
            session = told.sessions[session_id] = Session((*pair, terms.tenant))
        elif session.whose != (*pair, terms.tenant):
            ue, aisi, tenant = session.whose
            yield Rule.ONE_SESSION, f"session {session_id} is {tenant}'s, of {ue} with {aisi}"
        current = told.current.get(pair, session_id)
        if current != session_id and told.sessions[current].live:
            yield Rule.ONE_SESSION, f"{' with '.join(pair)} has session {current}"
        told.current[pair] = session_id
        until_ns = event.prepare_until_ns
        told.begin(LiveLease(terms, entry.index, entry.at_ns, State.PREPARED, until_ns))
        self.counts.leases += 1
        self.counts.sessions = len(told.sessions)

    def _later(self, entry: Entry, event: LeaseEvent) -> Found:
        lease = self._told.live.get(event.lease_id)
        if lease is None:
            known = event.lease_id in self._told.ended
            rule = Rule.ENDED_IS_FINAL if known else Rule.PREPARED_FIRST
            yield rule, f"lease {event.lease_id} {self._not_live(event.lease_id)}"
            return
        lease.index = entry.index
        if not isinstance(event, Ended) and entry.at_ns >= lease.deadline_ns + SLACK_NS:
            yield Rule.NOT_AFTER_EXPIRY, f"lease {event.lease_id} {was_over(lease)}"
        match event:
            case Committed():
                yield from self._committed(entry, lease, event)
            case Renewed():
                yield from self._renewed(lease, event)
            case DrainStarted():
                yield from self._drain_started(entry, lease, event)
            case Ended():
                yield from check_end(self._told, lease, event, entry.at_ns)
                self._ended(entry, lease, event)

    def _committed(self, entry: Entry, lease: LiveLease, event: Committed) -> Found:
        told, terms, until_ns = self._told, lease.terms, event.expires_ns
        session, steering = told.sessions[terms.session_id], told.steering(terms)
        if lease.state is not State.PREPARED:
            yield Rule.COMMIT_AFTER_PREPARE, f"lease {terms.lease_id} is {lease.state}"
        elif session.granted and not steering:
            self.counts.breaks += 1
            if not session.revoked:
                yield Rule.NO_GAP, f"session {terms.session_id} had no lease to move from"
        if until_ns <= entry.at_ns - SLACK_NS:
            detail = f"lease {terms.lease_id} was granted until {rfc3339(until_ns)}"
            yield Rule.NOT_AFTER_EXPIRY, detail
        for old in steering:
            told.write.flips.append(Flip(entry.index, old))
            if until_ns > old.deadline_ns:
                ran = rfc3339(old.deadline_ns)
                yield Rule.KEEPS_DEADLINE, f"lease {old.terms.lease_id} ran until {ran}"
        session.granted = True
        told.write.granted.append(terms)
        lease.state, lease.deadline_ns = State.COMMITTED, until_ns
        lease.committed_at_ns = entry.at_ns

    def _renewed(self, lease: LiveLease, event: Renewed) -> Found:
        name = f"lease {event.lease_id}"
        if lease.state is not State.COMMITTED:
            yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}, it has no COMMIT"
        if event.expires_ns < lease.deadline_ns:
            yield Rule.RENEWAL_GROWS, f"{name} ran until {rfc3339(lease.deadline_ns)}"
        lease.deadline_ns = event.expires_ns

    def _drain_started(self, entry: Entry, lease: LiveLease, event: DrainStarted) -> Found:
        name = f"lease {event.lease_id}"
        if lease.state is not State.COMMITTED:
            yield Rule.COMMIT_AFTER_PREPARE, f"{name} is {lease.state}, it steers nothing"
        if event.until_ns > lease.deadline_ns:
            yield Rule.DRAIN_WITHIN_LEASE, f"{name} ran until {rfc3339(lease.deadline_ns)}"
        if self._told.write.gives_way(lease):
            self.counts.relocations += 1
        else:
            detail = f"{name} drains, and no lease granted before it in this write takes over"
            yield Rule.MAKE_BEFORE_BREAK, detail
        lease.state, lease.deadline_ns = State.DRAINING, event.until_ns
        lease.drained_at_ns = entry.at_ns

    def _ended(self, entry: Entry, lease: LiveLease, event: Ended) -> None:
        told, counts = self._told, self.counts
        match event.reason:
            case EndReason.PREEMPTED:
                counts.preemptions += 1
                told.write.preempted.append((entry.index, lease.terms))
            case EndReason.ANCHOR_FAILED:
                counts.recoveries += told.write.gives_way(lease)
            case EndReason.REPAGED:
                counts.repages += 1
        told.end(lease, event.reason, entry.index)

    def _not_live(self, lease_id: str) -> str:
        ended = self._told.ended.get(lease_id)
        return "was never prepared" if ended is None else f"ended with entry {ended}"


def audit(entries: Iterable[Entry]) -> tuple[Counts, list[Finding]]:
    """Check a whole log."""
    auditor = Auditor()
    findings = [finding for entry in entries for finding in auditor.add(entry)]
    findings += auditor.finish()
    return auditor.counts, findings
