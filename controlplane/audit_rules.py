"""The rules that an evidence log must show to be kept, and what an audit finds."""

from dataclasses import dataclass
from enum import StrEnum

from controlplane.clock import NS_PER_MS
from controlplane.lease import TAKEN_BACK, EndReason, State

# A decision waits for the write and the kernel batch before it; an entry is stamped after that.
SLACK_NS = 250 * NS_PER_MS
# How long after its deadline a lease may still lack its end: the kernel needs nobody to close it.
LATE_NS = 2_000 * NS_PER_MS
CLOSING_NS = 1_000 * NS_PER_MS  # how old counts may be that are called closing counts
# The causes of a lease that was paged for: somebody asked, or a UE with a subscription just sent.
PAGES = frozenset({"PAGE", "FIRST_PACKET"})


class Rule(StrEnum):
    """What a log must show; the value names the rule in findings."""

    PREPARED_ONCE = "prepared-once"  # a lease id is used once
    PREPARED_FIRST = "prepared-first"  # nothing happens to a lease that was never prepared
    COMMIT_AFTER_PREPARE = "commit-after-prepare"  # and once, and within its time limit
    ENFORCED_AFTER_COMMIT = "enforced-after-commit"  # the kernel had it from the log
    EPOCH_GROWS = "epoch-grows"  # per UE and service
    ONE_SESSION = "one-session"  # per UE and service at a time; of one such pair, and one tenant
    MAKE_BEFORE_BREAK = "make-before-break"  # new lease and drain of the old in one write
    NO_GAP = "no-gap"  # a session is not without a lease between two, unless that was asked for
    DRAIN_WITHIN_LEASE = "drain-within-lease"
    KEEPS_DEADLINE = "keeps-deadline"  # a relocation does not lengthen what was granted
    NOT_AFTER_EXPIRY = "not-after-expiry"  # no renewal, drain, commit, enforcement or packet
    RENEWAL_GROWS = "renewal-grows"  # renewal never shortens
    END_REASON = "end-reason"  # one that state, time and the rest of the log bear out
    PREEMPTION = "preemption"  # only of what is preemptible, for what has a higher priority
    CLOSING_COUNTS = "closing-counts"  # what was granted ends with what it carried
    ENDED_IS_FINAL = "ended-is-final"
    ENDED_IN_TIME = "ended-in-time"  # what is over has its end in the log soon
    TIME_GOES_ON = "time-goes-on"  # while one controller runs


REASONS = {
    State.PREPARED: {EndReason.ABORTED, EndReason.PREPARE_TIMED_OUT, EndReason.NOT_ENFORCED},
    State.COMMITTED: {
        *(EndReason.EXPIRED, EndReason.RELEASED, EndReason.NOT_ENFORCED),
        *TAKEN_BACK,
    },
    State.DRAINING: {
        *(EndReason.RELOCATED, EndReason.RELEASED, EndReason.NOT_ENFORCED),
        *TAKEN_BACK,
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
    starts: int = 0  # of controllers
    leases: int = 0
    sessions: int = 0
    relocations: int = 0  # make-before-break
    recoveries: int = 0  # from an anchor that failed: there was nothing to keep
    repages: int = 0  # leases that ended because another service took over
    breaks: int = 0  # break-before-make: a session moved after its lease was revoked
    preemptions: int = 0  # leases
    open_leases: tuple[str, ...] = ()  # at the end of the log; they may still run
