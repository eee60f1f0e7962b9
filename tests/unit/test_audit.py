"""The auditor: what keeps the rules passes, and every breach is named with its entry."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from histories import (
    EVERYTHING,
    MOVE,
    PAGE,
    USAGE,
    Write,
    acknowledged,
    at,
    committed,
    drained,
    ended,
    entries,
    prepared,
    renewed,
)
from hypothesis import given
from hypothesis import strategies as st

from controlplane.audit import audit
from controlplane.audit_rules import CLOSING_NS, LATE_NS, SLACK_NS, Rule
from controlplane.clock import NS_PER_S
from controlplane.entries import Entry
from controlplane.facts import PolicySet, Started, UplinkHeld
from controlplane.fleet import AnchorFailed, AnchorRecovered
from controlplane.lease import Committed, DrainStarted, Ended, EndReason, Prepared
from controlplane.policy import Policy

LATE_S, SLACK_S, CLOSING_S = (ns / NS_PER_S for ns in (LATE_NS, SLACK_NS, CLOSING_NS))
RELEASED, REVOKED, EXPIRED = EndReason.RELEASED, EndReason.REVOKED, EndReason.EXPIRED
FAILED = AnchorFailed("edge1", "silent")


def found(*writes: Write) -> list[tuple[int, Rule]]:
    _, findings = audit(entries(writes))
    return [(finding.index, finding.rule) for finding in findings]


def recovery(reason: EndReason = EndReason.ANCHOR_FAILED, *, until: float = 60) -> Write:
    moved = prepared("b", 2, cause="FAILURE", anchor="edge2")
    return (10, [moved, committed("b", until), ended("a", reason, 10)])


def repage(cause: str = "FAILURE", **others: object) -> list[Write]:
    again = prepared("b", 1, "t", aisi="ears", cause=cause, **others)
    return [(10, [again, committed("b")]), (11, [ended("a", EndReason.REPAGED, 11)])]


def preemption(
    priority_level: int = 2, *, preemptible: bool = True, later: float = 0
) -> list[Write]:
    lost = prepared("a", preemptible=preemptible)
    taken = [
        prepared("b", 1, "t", ue="ue2", priority_level=priority_level),
        committed("b"),
    ]
    return [
        (0, [lost, committed()]),
        (10, [ended("a", EndReason.PREEMPTED, 10)]),
        (10 + later, taken),
    ]


# What keeps the rules


@pytest.mark.parametrize(
    "writes",
    [
        [],
        PAGE,
        EVERYTHING,
        [*PAGE, (59, [renewed("a", 120)]), (120, [ended("a", EXPIRED, 119.98)])],
        [*MOVE, (20, [ended("b", RELEASED, 20)]), (21, [prepared("c", 3, "t"), committed("c")])],
        # break before make, with an older lease still draining
        [
            *MOVE[:-1],
            (10.5, [ended("b", REVOKED, 10.5)]),
            (11, [ended("a", EndReason.RELOCATED, 11), prepared("c", 3)]),
            (12, [committed("c")]),
        ],
        # candidates that did not get ready
        [(0, [prepared()]), (1, [ended("a", EndReason.ABORTED)]), (1, [prepared("b", 2, "t")])],
        [(0, [prepared(until=5)]), (5, [ended("a", EndReason.PREPARE_TIMED_OUT)])],
        # two pairs at once, and others' changes between those of a flip
        [*PAGE, (2, [prepared("b", 1, "t", aisi="ears"), prepared("c", 1, "u", ue="ue2")])],
        [
            *MOVE[:4],
            (10, [committed("b"), prepared("x", 1, "t", ue="ue2"), committed("x"), drained("a")]),
        ],
        [*PAGE, (9, [FAILED]), recovery()],
        [*PAGE, (9, [FAILED, AnchorRecovered("edge1")]), recovery()],  # it was started anew
        # it had failed before, and the lease was on its way meanwhile
        [(-1, [FAILED]), *PAGE, recovery()],
        [*PAGE, (9, [FAILED]), (10, [ended("a", EndReason.ANCHOR_FAILED, 10)])],  # nowhere to go
        [*PAGE, *repage()],
        [*PAGE, (9, [PolicySet("clinic", Policy())]), (9, [ended("a", EndReason.POLICY, 9)])],
        preemption(),
        # nobody ran when they were over, or when their counts were to be read
        [*PAGE, (70, [Started("2"), ended("a", EXPIRED)])],
        [*PAGE, (59.9, [Started("2")]), (60, [ended("a", EXPIRED)])],
        [*PAGE, (59.9, [Started("2")]), (60, [ended("a", EXPIRED, 59.95)])],
        [*MOVE[:-1], (10.2, [Started("2")]), (11, [ended("a", EndReason.RELOCATED)])],
        # another controller, another clock
        [*PAGE, (-7, [Started("2")]), (-6, [renewed("a", 70)])],
    ],
)
def test_nothing_is_found(writes: Sequence[Write]) -> None:
    assert found(*writes) == []


def test_what_it_counts() -> None:
    counts, _ = audit(entries(EVERYTHING))
    assert (counts.starts, counts.leases, counts.sessions) == (2, 9, 7)
    assert (counts.relocations, counts.recoveries, counts.repages) == (1, 1, 1)
    assert (counts.breaks, counts.preemptions, counts.open_leases) == (0, 1, ())
    moved = [*PAGE, (2, [ended("a", REVOKED, 2)]), (2, [prepared("b", 2), committed("b")])]
    counts, _ = audit(entries(moved))
    assert (counts.breaks, counts.relocations, counts.open_leases) == (1, 0, ("b",))


# Each breach

BREACHES: list[tuple[str, Sequence[Write], list[tuple[int, Rule]]]] = [
    ("committed without prepare", [(1, [committed()])], [(0, Rule.PREPARED_FIRST)]),
    ("ended without prepare", [(1, [ended("a", RELEASED)])], [(0, Rule.PREPARED_FIRST)]),
    ("prepared twice", [*PAGE, (2, [prepared(epoch=2)])], [(3, Rule.PREPARED_ONCE)]),
    ("prepared again", [*MOVE, (12, [prepared(epoch=3)])], [(8, Rule.PREPARED_ONCE)]),
    ("committed twice", [*PAGE, (2, [committed()])], [(3, Rule.COMMIT_AFTER_PREPARE)]),
    (
        "renewed, never committed",
        [(0, [prepared()]), (1, [renewed("a", 99)])],
        [(1, Rule.COMMIT_AFTER_PREPARE)],
    ),
    (
        "drained, never committed",
        [(0, [prepared()]), (1, [drained(until=2)])],
        [(1, Rule.COMMIT_AFTER_PREPARE), (1, Rule.MAKE_BEFORE_BREAK)],
    ),
    # enforcement
    ("enforced unknown", [(1, [acknowledged("x", when=1)])], [(0, Rule.ENFORCED_AFTER_COMMIT)]),
    (
        "enforced without COMMIT",
        [(0, [prepared()]), (1, [acknowledged("a", when=0.5)])],
        [(1, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    (
        "enforced before COMMIT",
        [*PAGE[:2], (1.1, [acknowledged("a", when=0.999_999)])],
        [(2, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    (
        "enforced after the end",
        [*PAGE, (2, [ended("a", RELEASED, 2)]), (3, [acknowledged("a", when=2.9)])],
        [(4, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    (
        "enforced while it drains",
        [*MOVE[:-1], (10.5, [acknowledged("a", when=10.4)])],
        [(6, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    (
        "packets without COMMIT",
        [(0, [prepared()]), (1, [ended("a", EndReason.ABORTED, 1)])],
        [(1, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    (
        "enforced after expiry",
        [*PAGE[:2], (60.5, [acknowledged("a", when=60 + SLACK_S)])],
        [(2, Rule.NOT_AFTER_EXPIRY)],
    ),
    # epochs, sessions
    ("same epoch", [*PAGE, (9, [prepared("b", 1)])], [(3, Rule.EPOCH_GROWS)]),
    (
        "older epoch after the end",
        [(0, [prepared(epoch=7), ended("a", EndReason.ABORTED)]), (2, [prepared("b", 6, "t")])],
        [(2, Rule.EPOCH_GROWS)],
    ),
    ("second session", [*PAGE, (2, [prepared("b", 2, "t")])], [(3, Rule.ONE_SESSION)]),
    ("of two UEs", [*PAGE, (2, [prepared("b", 2, ue="ue2")])], [(3, Rule.ONE_SESSION)]),
    ("of two tenants", [*PAGE, (2, [prepared("b", 2, tenant="x")])], [(3, Rule.ONE_SESSION)]),
    # relocation
    (
        "drain after the flip",
        [*MOVE[:4], (10, [committed("b")]), (10.001, [drained("a")])],
        [(4, Rule.MAKE_BEFORE_BREAK), (5, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "drain before the flip",
        [*MOVE[:4], (10, [drained("a"), committed("b")])],
        [(4, Rule.MAKE_BEFORE_BREAK), (5, Rule.NO_GAP)],
    ),
    ("flip without a drain", [*MOVE[:4], (10, [committed("b")])], [(4, Rule.MAKE_BEFORE_BREAK)]),
    ("drain without a flip", [*PAGE, (10, [drained()])], [(3, Rule.MAKE_BEFORE_BREAK)]),
    (
        "flip that another session's drain is to settle",
        [
            *MOVE[:4],
            (9, [prepared("x", 1, "t", ue="ue2"), committed("x")]),
            (10, [committed("b"), drained("x")]),
        ],
        [(6, Rule.MAKE_BEFORE_BREAK), (7, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "the old lease ends at once",
        [*PAGE, recovery(REVOKED)],
        [(4, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "recovery in two writes",
        [
            *PAGE,
            (9, [FAILED, ended("a", EndReason.ANCHOR_FAILED, 9)]),
            (9.5, [prepared("b", 2), committed("b")]),
        ],
        [(6, Rule.NO_GAP)],
    ),
    (
        "a session that was over",
        [*PAGE, (5, [ended("a", RELEASED, 5)]), (6, [prepared("b", 2), committed("b")])],
        [(5, Rule.NO_GAP)],
    ),
    ("held beyond its end", [*PAGE, (5, [UplinkHeld("a", at(61))])], [(3, Rule.NOT_AFTER_EXPIRY)]),
    (
        "held while it drains",
        [*MOVE[:-1], (10.5, [UplinkHeld("a", at(10.9))])],
        [(6, Rule.ENFORCED_AFTER_COMMIT)],
    ),
    ("recovery from a live anchor", [*PAGE, recovery()], [(5, Rule.END_REASON)]),
    (
        "recovery from a failure of long ago",
        [(-2, [FAILED]), (-1, [AnchorRecovered("edge1")]), *PAGE, recovery()],
        [(7, Rule.END_REASON)],
    ),
    (
        "recovery into a longer lease",
        [*PAGE, (9, [FAILED]), recovery(until=61)],
        [(5, Rule.KEEPS_DEADLINE)],
    ),
    ("paged for by the UE", [*PAGE, *repage("PAGE")], [(5, Rule.END_REASON)]),
    ("paged for by another UE", [*PAGE, *repage(ue="ue2")], [(5, Rule.END_REASON)]),
    ("paged for by another tenant", [*PAGE, *repage(tenant="x")], [(5, Rule.END_REASON)]),
    (
        "paged for too late",
        [*PAGE, (9, [ended("a", EndReason.REPAGED, 9)]), *repage()[:1]],
        [(3, Rule.END_REASON)],
    ),
    (
        "drain beyond the lease",
        [*MOVE[:4], (10, [committed("b"), drained("a", 60.001)])],
        [(5, Rule.DRAIN_WITHIN_LEASE)],
    ),
    (
        "relocated into a longer lease",
        [*MOVE[:4], (10, [committed("b", 60.001), drained("a")])],
        [(4, Rule.KEEPS_DEADLINE)],
    ),
    # time
    (
        "committed after the time limit",
        [(0, [prepared(until=1)]), (1 + SLACK_S, [committed()])],
        [(1, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "committed for the past",
        [(0, [prepared()]), (1 + SLACK_S, [committed(until=1)])],
        [(1, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "renewed after expiry",
        [*PAGE, (60 + SLACK_S, [renewed("a", 90)])],
        [(3, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "superseded after expiry",
        [*PAGE, (59, [prepared("b", 2)]), (61, [committed("b", 60.9), drained("a", 60)])],
        [(4, Rule.KEEPS_DEADLINE), (5, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "the kernel still had it",
        [*PAGE, (61, [ended("a", EXPIRED, 60 + SLACK_S)])],
        [(3, Rule.NOT_AFTER_EXPIRY)],
    ),
    ("renewal that shortens", [*PAGE, (2, [renewed("a", 59)])], [(3, Rule.RENEWAL_GROWS)]),
    ("back in time", [*PAGE, (1, [renewed("a", 61)])], [(3, Rule.TIME_GOES_ON)]),
    (
        "acknowledged in the future",
        [*PAGE[:2], (2, [acknowledged("a", when=2.001)])],
        [(2, Rule.TIME_GOES_ON)],
    ),
    # the end
    ("expired too early", [*PAGE, (59.9, [ended("a", EXPIRED, 59.9)])], [(3, Rule.END_REASON)]),
    (
        "aborted after COMMIT",
        [*PAGE, (2, [ended("a", EndReason.ABORTED, 2)])],
        [(3, Rule.END_REASON)],
    ),
    (
        "never relocated",
        [*PAGE, (61, [ended("a", EndReason.RELOCATED, 59.9)])],
        [(3, Rule.END_REASON)],
    ),
    (
        "taken back before COMMIT",
        [(0, [prepared()]), (1, [ended("a", REVOKED)])],
        [(1, Rule.END_REASON)],
    ),
    ("no policy", [*PAGE, (9, [ended("a", EndReason.POLICY, 9)])], [(3, Rule.END_REASON)]),
    ("equal priority", preemption(8), [(2, Rule.PREEMPTION)]),
    ("not preemptible", preemption(preemptible=False), [(2, Rule.PREEMPTION)]),
    ("preempted for later", preemption(later=0.001), [(2, Rule.PREEMPTION)]),
    (
        "no counts of what this controller superseded",
        [(-1, [Started("2")]), *MOVE[:-1], (11, [ended("a", EndReason.RELOCATED)])],
        [(7, Rule.CLOSING_COUNTS)],
    ),
    ("no counts", [*PAGE, (2, [ended("a", RELEASED)])], [(3, Rule.CLOSING_COUNTS)]),
    (
        "no counts long after a start",
        [*PAGE, (50, [Started("2")]), (60, [ended("a", EXPIRED)])],
        [(4, Rule.CLOSING_COUNTS)],
    ),
    (
        "no counts of what the new controller granted",
        [(0, [Started("2"), prepared(), committed(until=0.2)]), (0.3, [ended("a", EXPIRED)])],
        [(3, Rule.CLOSING_COUNTS)],
    ),
    (
        "counts of before COMMIT",
        [*PAGE[:2], (1.2, [ended("a", RELEASED, 0.9)])],
        [(2, Rule.CLOSING_COUNTS)],
    ),
    ("counts of later", [*PAGE, (2, [ended("a", RELEASED, 2.001)])], [(3, Rule.CLOSING_COUNTS)]),
    (
        "old counts",
        [*PAGE, (60, [ended("a", EXPIRED, 59.999 - CLOSING_S)])],
        [(3, Rule.CLOSING_COUNTS)],
    ),
    ("renewed after the end", [*MOVE, (12, [renewed("a", 60)])], [(8, Rule.ENDED_IS_FINAL)]),
    ("ended twice", [*MOVE, (12, [ended("a", RELEASED, 12)])], [(8, Rule.ENDED_IS_FINAL)]),
    (
        "never ended",
        [*PAGE, (60 + LATE_S, [prepared("b", 1, "t", ue="ue2")])],
        [(1, Rule.ENDED_IN_TIME)],
    ),
    (
        "ended late",
        [*PAGE, (60.001 + LATE_S, [ended("a", EXPIRED, 59.98)])],
        [(3, Rule.ENDED_IN_TIME)],
    ),
    (
        "ended late after a start",
        [*PAGE, (70, [Started("2")]), (70.001 + LATE_S, [ended("a", EXPIRED)])],
        [(4, Rule.ENDED_IN_TIME)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("writes", "named"), [pytest.param(writes, named, id=name) for name, writes, named in BREACHES]
)
def test_a_breach_is_named(writes: Sequence[Write], named: list[tuple[int, Rule]]) -> None:
    assert sorted(found(*writes)) == sorted(named)


def test_every_rule_is_broken_here() -> None:
    assert {rule for _, _, named in BREACHES for _, rule in named} == set(Rule)


def test_every_rule_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
    assert all(f"| `{rule}` | " in text for rule in Rule)


def test_times_are_allowed_the_slack_of_their_stamp() -> None:
    soon = SLACK_S - 0.001
    assert found(*PAGE, (60 + soon, [renewed("a", 90)])) == []
    assert found((0, [prepared(until=1)]), (1 + soon, [committed()])) == []
    assert found(*PAGE[:2], (61, [acknowledged("a", when=60 + soon)])) == []
    assert found(*PAGE, (61, [ended("a", EXPIRED, 60 + soon)])) == []
    assert found(*PAGE, (60, [ended("a", EXPIRED, 60 - CLOSING_S)])) == []
    assert found(*PAGE, (60 + LATE_S, [ended("a", EXPIRED, 59.9)])) == []


# Any log

ALL = entries(EVERYTHING)


@given(st.data())
def test_no_log_brings_it_down(data: st.DataObject) -> None:
    """Entries of a good log in any order and number, at any time, about any lease: an answer."""
    ids = st.sampled_from("abcdefghi")

    def scrambled(number: int, entry: Entry) -> Entry:
        event = entry.event
        if hasattr(event, "lease_id") and data.draw(st.booleans()):
            event = replace(event, lease_id=data.draw(ids))
        moved = entry.at_ns + data.draw(st.integers(-1, 1)) * NS_PER_S
        return Entry(number, moved, event)

    picked = data.draw(st.lists(st.sampled_from(ALL), max_size=60))
    counts, findings = audit(scrambled(number, entry) for number, entry in enumerate(picked))
    assert counts.entries == len(picked)
    assert all(0 <= finding.index < len(picked) for finding in findings)


def is_missed(entry: Entry) -> bool:
    """Whether the log is no good without an entry: one of a lease's life, or one that excuses."""
    event = entry.event
    if isinstance(event, Prepared):
        return True
    if isinstance(event, Committed | DrainStarted | Ended):
        # What came to nothing might not have been granted; the very last end may be yet to come.
        return event.lease_id != "i" and entry != ALL[-1]
    return isinstance(event, AnchorFailed | Started) and entry != ALL[0]


@pytest.mark.parametrize("left_out", [entry.index for entry in filter(is_missed, ALL)])
def test_what_is_left_out_is_missed(left_out: int) -> None:
    """Links are no help if the controller itself leaves an entry out."""
    _, findings = audit(entry for entry in ALL if entry.index != left_out)
    assert findings


def test_a_longer_life_than_granted_is_found_whenever_it_ends() -> None:
    for late_ns in (LATE_NS + 1, 10 * LATE_NS, 3_600 * NS_PER_S):
        seconds = 60 + late_ns / NS_PER_S
        late = Ended("a", EXPIRED, USAGE, at(seconds))
        rules = {rule for _, rule in found(*PAGE, (seconds, [late]))}
        assert rules == {Rule.ENDED_IN_TIME, Rule.NOT_AFTER_EXPIRY}
