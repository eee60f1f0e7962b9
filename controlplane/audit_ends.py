"""The rules about the end of a lease: its reason, its time, and what it had carried by then."""

from collections.abc import Iterator

from controlplane.audit_rules import (
    AT_DEADLINE,
    CLOSING_NS,
    LATE_NS,
    PAGES,
    REASONS,
    SLACK_NS,
    Rule,
)
from controlplane.audit_state import LiveLease, Told
from controlplane.clock import rfc3339
from controlplane.lease import Ended, EndReason, State

Found = Iterator[tuple[Rule, str]]


def check_end(told: Told, lease: LiveLease, event: Ended, at_ns: int) -> Found:
    """Yield what is wrong with the end of a lease, at `at_ns`."""
    name, reason = f"lease {event.lease_id}", event.reason
    if reason not in REASONS[lease.state]:
        yield Rule.END_REASON, f"{name} is {lease.state}: it cannot end {reason}"
    elif reason in AT_DEADLINE and at_ns < lease.deadline_ns:
        ran = rfc3339(lease.deadline_ns)
        yield Rule.END_REASON, f"{name} ran until {ran}: it had not {reason} yet"
    elif (missing := _missing(told, lease, reason)) is not None:
        yield Rule.END_REASON, f"{name} ended {reason}, and {missing}"
    if reason is EndReason.PREEMPTED and not lease.terms.preemptible:
        yield Rule.PREEMPTION, f"{name} is not preemptible"
    if at_ns > told.due_ns(lease) + LATE_NS:
        yield Rule.ENDED_IN_TIME, f"{name} {was_over(lease)}"
    if lease.state is not State.PREPARED:
        yield from _check_counts(told, lease, event, at_ns)
    elif event.usage is not None:
        yield Rule.ENFORCED_AFTER_COMMIT, f"{name} has carried packets, and has no COMMIT"


def was_over(lease: LiveLease) -> str:
    """Say since when a lease's deadline has passed."""
    return f"was over at {rfc3339(lease.deadline_ns)}"


def _missing(told: Told, lease: LiveLease, reason: EndReason) -> str | None:
    """Return what would be in the log if the reason were true, and is not."""
    terms = lease.terms
    match reason:
        case EndReason.ANCHOR_FAILED if lease.state is State.COMMITTED:
            failed_ns = told.failed_ns.get(terms.anchor or "", -1)
            if terms.anchor not in told.dead and failed_ns < lease.prepared_at_ns:
                return f"{terms.anchor} has not failed since it was prepared"
        case EndReason.POLICY if terms.tenant not in told.policies:
            return f"{terms.tenant} was given no policy"
        case EndReason.REPAGED:
            if not any(_takes_over(other, lease) for other in told.of_ue[terms.ue].values()):
                return f"{terms.ue} has been paged to no other service"
    return None


def _takes_over(other: LiveLease, lease: LiveLease) -> bool:
    """Whether a lease was granted because another session of its UE could not go on."""
    return (
        other.state is State.COMMITTED
        and other.terms.session_id != lease.terms.session_id
        and other.terms.tenant == lease.terms.tenant
        and other.terms.cause not in PAGES
        and other.committed_at_ns >= lease.committed_at_ns
    )


def _check_counts(told: Told, lease: LiveLease, event: Ended, at_ns: int) -> Found:
    name, counted = f"lease {event.lease_id}", rfc3339(event.counted_ns)
    if event.usage is None:
        if event.reason is not EndReason.NOT_ENFORCED and not _unattended(told, lease):
            yield Rule.CLOSING_COUNTS, f"{name} ended {event.reason}, without its counts"
    elif not lease.committed_at_ns <= event.counted_ns <= at_ns:
        yield Rule.CLOSING_COUNTS, f"those of {name} are of {counted}, outside its life"
    elif event.counted_ns < min(at_ns, lease.deadline_ns) - CLOSING_NS:
        yield Rule.CLOSING_COUNTS, f"those of {name} are of {counted}, long before its end"
    elif event.counted_ns >= lease.deadline_ns + SLACK_NS:
        yield Rule.NOT_AFTER_EXPIRY, f"the kernel had {name} at {counted}; it {was_over(lease)}"


def _unattended(told: Told, lease: LiveLease) -> bool:
    """Whether an earlier controller had a lease's counts, or none ran when they were to be read.

    The kernel has a lease's uplink counts until it is superseded, and the others until its end.
    """
    started_ns = told.started_ns
    if lease.state is State.DRAINING and lease.drained_at_ns < started_ns:
        return True
    return lease.committed_at_ns < started_ns and lease.deadline_ns < started_ns + SLACK_NS
