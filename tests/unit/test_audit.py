"""The auditor: what really happens keeps the rules, and every breach is named with its entry."""

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from fakes import World
from hypothesis import HealthCheck, settings
from test_controller_history import AnyHistory

from controlplane.audit import LATE_NS, SLACK_NS, Rule, audit
from controlplane.clock import NS_PER_S
from controlplane.enforcement import Flow
from controlplane.entries import Entry
from controlplane.intent import Intent
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Event,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.verification import verify_log

INTENT = Intent(task="text-generation")
SHORT = Intent.model_validate({"task": "text-generation", "durationMs": 2_000})
T0 = 1_760_000_000 * NS_PER_S
Told = tuple[float, Event]  # seconds after T0, event


def prepared(
    lease: str = "a",
    epoch: int = 1,
    session: str = "s",
    *,
    ue: str = "ue1",
    aisi: str = "chat",
    until: float = 99,
) -> Prepared:
    flow = Flow(IPv4Address("10.45.0.1"), IPv4Address("198.18.0.1"))
    terms = Terms(
        lease_id=lease,
        session_id=session,
        ue=ue,
        aisi=aisi,
        anchor="edge1",
        flows=(flow,),
        epoch=epoch,
        intent=INTENT,
    )
    return Prepared(terms, at(until))


def at(seconds: float) -> int:
    return T0 + int(seconds * NS_PER_S)


def committed(lease: str = "a", until: float = 60) -> Committed:
    return Committed(lease, at(until))


def drained(lease: str = "a", until: float = 11) -> DrainStarted:
    return DrainStarted(lease, at(until))


def ended(lease: str = "a", reason: EndReason = EndReason.RELEASED) -> Ended:
    return Ended(lease, reason)


def found(*told: Told) -> list[tuple[int, Rule]]:
    entries = [Entry(index, at(seconds), event) for index, (seconds, event) in enumerate(told)]
    _, findings = audit(entries)
    return [(finding.index, finding.rule) for finding in findings]


PAGE: tuple[Told, ...] = ((0, prepared()), (1, committed()))
MOVE: tuple[Told, ...] = (
    *PAGE,
    (9, prepared("b", 2, until=14)),
    (10, committed("b")),
    (10, drained("a")),
    (11, ended("a", EndReason.RELOCATED)),
)


# What keeps the rules


@pytest.mark.parametrize(
    "told",
    [
        (),
        PAGE,
        (*PAGE, (59, Renewed("a", at(120))), (120, ended("a", EndReason.EXPIRED))),
        (*MOVE, (60, ended("b", EndReason.EXPIRED))),
        (*MOVE, (20, ended("b")), (21, prepared("c", 3, "t")), (22, committed("c"))),
        # break before make
        (*PAGE, (9, ended("a", EndReason.REVOKED)), (9, prepared("b", 2)), (9, committed("b"))),
        # candidates that did not get ready
        ((0, prepared()), (1, ended("a", EndReason.ABORTED)), (1, prepared("b", 2, "t"))),
        ((0, prepared(until=5)), (5, ended("a", EndReason.PREPARE_TIMED_OUT))),
        # a crash cut the flip's write, then the controller came up again, or did not yet
        (*MOVE[:4], (12, ended("b", EndReason.NOT_ENFORCED)), (60, ended("a", EndReason.EXPIRED))),
        MOVE[:4],
        # two pairs at once
        (*PAGE, (2, prepared("b", 1, "t", aisi="ears")), (2, prepared("c", 1, "u", ue="ue2"))),
    ],
)
def test_nothing_is_found(told: Sequence[Told]) -> None:
    assert found(*told) == []


def test_what_it_counts() -> None:
    entries = [Entry(index, at(when), event) for index, (when, event) in enumerate(MOVE)]
    counts, _ = audit(entries)
    assert (counts.entries, counts.leases, counts.sessions, counts.relocations) == (6, 2, 1, 1)
    assert counts.open_leases == ("b",)


# Each breach


LATE_S = LATE_NS / NS_PER_S
SLACK_S = SLACK_NS / NS_PER_S
BREACHES: list[tuple[str, Sequence[Told], list[tuple[int, Rule]]]] = [
    ("committed without prepare", [(1, committed())], [(0, Rule.PREPARED_FIRST)]),
    ("ended without prepare", [(1, ended())], [(0, Rule.PREPARED_FIRST)]),
    ("prepared twice", [*PAGE, (2, prepared(epoch=2))], [(2, Rule.PREPARED_ONCE)]),
    ("committed twice", [*PAGE, (2, committed())], [(2, Rule.COMMIT_AFTER_PREPARE)]),
    (
        "renewed, never committed",
        [(0, prepared()), (1, Renewed("a", at(99)))],
        [(1, Rule.COMMIT_AFTER_PREPARE)],
    ),
    (
        "drained, never committed",
        [(0, prepared()), (1, drained(until=2))],
        [(1, Rule.COMMIT_AFTER_PREPARE), (1, Rule.MAKE_BEFORE_BREAK)],
    ),
    ("same epoch", [*PAGE, (9, prepared("b", 1))], [(2, Rule.EPOCH_GROWS)]),
    (
        "older epoch after the end",
        [(0, prepared(epoch=7)), (1, ended("a", EndReason.ABORTED)), (2, prepared("b", 6, "t"))],
        [(2, Rule.EPOCH_GROWS)],
    ),
    ("second session", [*PAGE, (2, prepared("b", 2, "t"))], [(2, Rule.ONE_SESSION)]),
    (
        "a session of two UEs",
        [*PAGE, (2, prepared("b", 2, "s", ue="ue2"))],
        [(2, Rule.ONE_SESSION)],
    ),
    (
        "drain after the flip",
        [*MOVE[:4], (10.001, drained("a"))],
        [(4, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "drain before the flip",
        [*MOVE[:3], (10, drained("a")), (10, committed("b"))],
        [(3, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "something between flip and drain",
        [*MOVE[:4], (10, prepared("x", 1, "t", ue="ue2")), (10, drained("a"))],
        [(5, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "flip without a drain",
        [*MOVE[:4], (12, Renewed("b", at(60)))],
        [(4, Rule.MAKE_BEFORE_BREAK)],
    ),
    (
        "flip without a drain, and no word of it any more",
        [*MOVE[:4], (12, Renewed("a", at(70)))],
        [(3, Rule.MAKE_BEFORE_BREAK)],
    ),
    ("drain without a flip", [*PAGE, (10, drained())], [(2, Rule.MAKE_BEFORE_BREAK)]),
    (
        "drain beyond the lease",
        [*MOVE[:4], (10, drained("a", until=60.001))],
        [(4, Rule.DRAIN_WITHIN_LEASE)],
    ),
    (
        "relocated into a longer lease",
        [*MOVE[:3], (10, committed("b", until=60.001)), (10, drained("a"))],
        [(3, Rule.KEEPS_DEADLINE)],
    ),
    (
        "committed after the time limit",
        [(0, prepared(until=1)), (1 + SLACK_S, committed())],
        [(1, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "committed for the past",
        [(0, prepared()), (1 + SLACK_S, committed(until=1))],
        [(1, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "renewed after expiry",
        [*PAGE, (60 + SLACK_S, Renewed("a", at(90)))],
        [(2, Rule.NOT_AFTER_EXPIRY)],
    ),
    (
        "superseded after expiry",
        [*PAGE, (59, prepared("b", 2, until=70)), (61, committed("b", 61)), (61, drained("a", 60))],
        [(4, Rule.NOT_AFTER_EXPIRY), (3, Rule.KEEPS_DEADLINE)],
    ),
    ("renewal that shortens", [*PAGE, (2, Renewed("a", at(59)))], [(2, Rule.RENEWAL_GROWS)]),
    ("expired too early", [*PAGE, (59.9, ended("a", EndReason.EXPIRED))], [(2, Rule.END_REASON)]),
    ("aborted after COMMIT", [*PAGE, (2, ended("a", EndReason.ABORTED))], [(2, Rule.END_REASON)]),
    ("not relocated", [*PAGE, (61, ended("a", EndReason.RELOCATED))], [(2, Rule.END_REASON)]),
    ("renewed after the end", [*MOVE, (12, Renewed("a", at(60)))], [(6, Rule.ENDED_IS_FINAL)]),
    ("ended twice", [*MOVE, (12, ended("a"))], [(6, Rule.ENDED_IS_FINAL)]),
    (
        "never ended",
        [*PAGE, (60 + LATE_S, prepared("b", 1, "t", ue="ue2", until=99))],
        [(1, Rule.ENDED_IN_TIME)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("told", "named"), [pytest.param(told, named, id=name) for name, told, named in BREACHES]
)
def test_a_breach_is_named(told: Sequence[Told], named: list[tuple[int, Rule]]) -> None:
    assert sorted(found(*told)) == sorted(named)


def test_every_rule_is_broken_here() -> None:
    assert {rule for _, _, named in BREACHES for _, rule in named} == set(Rule)


def test_every_rule_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
    assert all(f"| `{rule}` | " in text for rule in Rule)


def test_times_are_allowed_the_slack_of_their_stamp() -> None:
    soon = SLACK_S - 0.001
    assert found(*PAGE, (60 + soon, Renewed("a", at(90)))) == []
    assert found((0, prepared(until=1)), (1 + soon, committed())) == []


# What really happens


def test_a_real_history_is_clean(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        first = await world.controller.page("ue1", INTENT)
        await world.controller.page("ue2", SHORT)
        session_id = first.lease.terms.session_id
        world.clock.advance(100)
        await world.controller.relocate(session_id, "cloud")
        world.controller.renew(session_id, 90_000)
        world.clock.advance(100)
        world.controller.tick()
        world.controller.release(session_id)
        world.clock.advance(2_000)
        world.restart()
        await world.controller.page("ue1", INTENT)

    asyncio.run(history())
    world.close()
    with world.path.open("rb") as lines:
        verdict = verify_log(lines, None)
    assert verdict.problems == []
    assert verdict.size == verdict.audited == len(world.entries())
    assert (verdict.counts.relocations, len(verdict.counts.open_leases)) == (1, 1)


class AuditedHistory(AnyHistory):
    """Whatever happens, whatever fails and wherever it crashes, the log keeps the rules."""

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.restart()
            self.world.controller.tick()
            with self.world.path.open("rb") as lines:
                verdict = verify_log(lines, None)
            assert verdict.problems == []
            assert verdict.root == self.world.journal.root()
            live = {held.terms.lease_id for held in self.world.ledger.live()}
            assert set(verdict.counts.open_leases) == live
        super().teardown()


AuditedHistory.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAuditedHistory = AuditedHistory.TestCase
