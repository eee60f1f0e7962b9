"""The fleet: whose anchors they are, who is alive, and that a stalled controller blames nobody."""

from contextlib import suppress
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.catalogue import Anchor, Hosting
from controlplane.clock import NS_PER_MS
from controlplane.fleet import (
    AnchorDraining,
    AnchorEvent,
    AnchorFailed,
    AnchorRecovered,
    AnchorRegistered,
    Fleet,
    FleetError,
    Heartbeat,
)
from controlplane.resolver import AnchorState

BUDGET_MS, INTERVAL_MS = 200, 25
SILENCE_MS = BUDGET_MS - 2 * INTERVAL_MS
POINTS = ("edge1", "edge2", "cloud")
BEAT = Heartbeat(boot_id="boot1", load=0.25, ready_aisis=frozenset({"chat"}), latency_ms=12.0)


def ms(instant_ms: float) -> int:
    return int(instant_ms * NS_PER_MS)


def anchor(name: str = "edge1", slots: int = 4) -> Anchor:
    return Anchor(
        name=name,
        region="north",
        trust_tier=1,
        slots=slots,
        cost=1.0,
        hosts=[Hosting(aisi="chat", service_time_ms=20.0)],
    )


def fleet() -> Fleet:
    return Fleet([anchor("edge1"), anchor("edge2")], POINTS, budget_ms=BUDGET_MS)


def fold(of: Fleet, events: tuple[AnchorEvent, ...]) -> tuple[AnchorEvent, ...]:
    for event in events:
        of.fold(event)
    return events


def state(of: Fleet, name: str = "edge1") -> AnchorState:
    return next(view.state for view in of.views({}) if view.anchor.name == name)


# Whose they are


def test_nobody_takes_over_another_providers_anchor() -> None:
    served = fleet()
    fold(served, served.register(anchor("cloud"), "acme"))
    assert served.provider("cloud") == "acme"
    for request in (
        ("register", "cloud", "other", 1),
        ("drain", "cloud", "other"),
        ("deregister", "cloud", "other"),
    ):
        with pytest.raises(FleetError) as error:
            ask(served, request, 0)
        assert error.value.cause == "ANCHOR_OWNED"
    assert served.drain("cloud")  # the operator may
    fold(served, served.deregister("cloud", "acme"))
    assert served.register(anchor("cloud"), "other")


def test_an_anchor_says_nothing_about_whose_it_is() -> None:
    claims = anchor("cloud").model_copy(update={"provider": "operator"})
    (event,) = fleet().register(claims, "acme")
    assert isinstance(event, AnchorRegistered)
    assert event.anchor.provider == event.provider == "acme"


def test_what_the_user_plane_does_not_know_is_no_anchor() -> None:
    served = fleet()
    with pytest.raises(FleetError) as error:
        served.register(anchor("elsewhere"), "acme")
    assert error.value.cause == "ATTACHMENT_POINT_UNKNOWN"
    for request in (
        ("drain", "cloud", "operator"),
        ("deregister", "cloud", "operator"),
        ("heartbeat", "cloud", "boot1"),
    ):
        with pytest.raises(FleetError) as error:
            ask(served, request, 0)
        assert error.value.cause == "ANCHOR_UNKNOWN"
    served.fold(AnchorRegistered(anchor("gone"), "acme"))  # replayed, over another topology
    assert state(served, "gone") is AnchorState.DOWN


def test_registering_anew_updates_and_ends_a_drain() -> None:
    served = fleet()
    fold(served, served.drain("edge1"))
    assert state(served) is AnchorState.DRAINING
    assert served.drain("edge1") == ()
    fold(served, served.register(anchor("edge1", slots=1), "operator"))
    assert state(served) is AnchorState.UP
    assert served.anchors["edge1"].slots == 1
    assert served.register(anchor("edge1", slots=1), "operator") == ()  # nothing new to journal


def test_views_follow_every_change() -> None:
    served = fleet()
    first = served.views({})
    assert served.views({"edge1": 0}) == first
    assert served.views({"edge1": 3})[0].slots_used == 3
    assert first[0].ready_aisis is None  # must be asked
    served.heartbeat("edge1", 0, BEAT)
    view = served.views({})[0]
    assert (view.load, view.latency_ms, view.ready_aisis) == (0.25, 12.0, BEAT.ready_aisis)
    fold(served, served.deregister("edge1"))
    assert [view.anchor.name for view in served.views({})] == ["edge2"]


# Who is alive


def test_an_anchor_that_never_sends_a_heartbeat_is_up_until_it_refuses() -> None:
    served = fleet()
    assert served.next_check_ns is None
    assert served.check(ms(10_000)) == ()
    assert state(served) is AnchorState.UP
    assert served.to_probe() == []
    fold(served, served.suspect("edge1", "connection refused", ms(10_000)))
    assert state(served) is AnchorState.DOWN
    assert served.to_probe() == ["edge1"]
    assert served.answered("edge2", ms(10_001)) == ()
    assert fold(served, served.answered("edge1", ms(10_001))) == (AnchorRecovered("edge1"),)
    assert state(served) is AnchorState.UP


def test_an_anchor_that_sends_heartbeats_is_judged_by_them() -> None:
    served = fleet()
    served.heartbeat("edge1", 0, BEAT)
    assert served.suspect("edge1", "connection refused", ms(10)) == ()
    served.heartbeat("edge1", ms(20), BEAT)  # it is heard, and has its whole budget again
    assert silence_until_failure(served, ms(20)) >= ms(SILENCE_MS)

    served = fleet()
    served.heartbeat("edge1", 0, BEAT)
    served.suspect("edge1", "connection refused", ms(10))
    assert silence_until_failure(served, 0) <= ms(10 + BUDGET_MS / 2 + 2 * INTERVAL_MS)
    assert served.to_probe() == []


def silence_until_failure(served: Fleet, heard_ns: int) -> int:
    """Check on time until the anchor has failed; return how long it was silent."""
    for _ in range(100):
        assert served.next_check_ns is not None
        now_ns = max(served.next_check_ns, heard_ns)
        if events := fold(served, served.check(now_ns)):
            assert [event.name for event in events if isinstance(event, AnchorFailed)] == ["edge1"]
            return now_ns - heard_ns
    pytest.fail("it was never failed")


def test_an_anchor_that_was_started_anew_has_failed_and_recovered() -> None:
    served = fleet()
    served.heartbeat("edge1", 0, BEAT)
    again = replace(BEAT, boot_id="boot2")
    failed, recovered = fold(served, served.heartbeat("edge1", ms(50), again))
    assert isinstance(failed, AnchorFailed)
    assert recovered == AnchorRecovered("edge1")
    assert served.heartbeat("edge1", ms(100), again) == ()
    assert state(served) is AnchorState.UP


def test_a_failure_and_a_recovery_are_said_once_while_they_become_durable() -> None:
    served = fleet()
    served.heartbeat("edge1", 0, BEAT)
    said = [event for at in range(25, 375, 25) for event in served.check(ms(at))]
    assert said == [AnchorFailed("edge1", "it has been silent for 175 ms")]
    assert served.check(ms(375))  # it was not written: once more
    served.fold(said[0])
    assert served.check(ms(400)) == ()
    assert served.heartbeat("edge1", ms(500), BEAT) == (AnchorRecovered("edge1"),)
    assert served.heartbeat("edge1", ms(550), BEAT) == ()
    served.fold(AnchorRecovered("edge1"))
    assert state(served) is AnchorState.UP


def test_a_draining_anchor_that_recovers_still_drains() -> None:
    served = fleet()
    for event, expected in (
        (AnchorDraining("edge1"), AnchorState.DRAINING),
        (AnchorFailed("edge1", "silent"), AnchorState.DOWN),
        (AnchorRecovered("edge1"), AnchorState.DRAINING),
    ):
        served.fold(event)
        assert state(served) is expected


Stalls = list[tuple[int, int]]  # from, to


def simulate(beats_ns: list[int], stalls_ns: Stalls, until_ns: int) -> list[int]:
    """Run a controller that does nothing during stalls; return when it failed the anchor.

    After a stall it checks first and reads then: the worst order.
    """
    served, failed_ns = fleet(), list[int]()

    def awake(at_ns: int) -> int:
        return next((to_ns for from_ns, to_ns in stalls_ns if from_ns <= at_ns < to_ns), at_ns)

    reads = [awake(at_ns) for at_ns in beats_ns]
    while True:
        check_ns = until_ns if served.next_check_ns is None else awake(served.next_check_ns)
        if reads and reads[0] < check_ns:
            events = fold(served, served.heartbeat("edge1", now_ns := reads.pop(0), BEAT))
        elif check_ns < until_ns:
            events = fold(served, served.check(now_ns := check_ns))
        else:
            return failed_ns
        failed_ns += [now_ns for event in events if isinstance(event, AnchorFailed)]


lengths = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 3_000)), max_size=6)
gaps = st.lists(st.integers(1, SILENCE_MS - 1), min_size=5, max_size=50)


def stalls(lengths_ms: list[tuple[int, int]]) -> Stalls:
    """Return when stalls are of which each begins so long after the one before, and lasts so."""
    at_ms, found = 0, []
    for quiet_ms, length_ms in lengths_ms:
        begin_ms, at_ms = at_ms + quiet_ms, at_ms + quiet_ms + length_ms
        found.append((ms(begin_ms), ms(at_ms)))
    return found


@given(gaps, lengths)
def test_no_stall_of_the_controller_fails_a_live_anchor(
    gaps_ms: list[int], lengths_ms: list[tuple[int, int]]
) -> None:
    beats_ns = [ms(at_ms) for at_ms in accumulate(gaps_ms)]
    assert simulate(beats_ns, stalls(lengths_ms), beats_ns[-1]) == []


# As anchors are told to: a quarter of the budget. Each stall of the whole machine may cost them up
# to one interval between checks.
few = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 3_000)), max_size=3)
kept = st.lists(st.integers(1, BUDGET_MS // 4), min_size=5, max_size=50)


@given(kept, few)
def test_no_stall_of_the_whole_machine_fails_an_anchor_that_goes_on_after_it(
    gaps_ms: list[int], lengths_ms: list[tuple[int, int]]
) -> None:
    together, beats_ns, at_ns = stalls(lengths_ms), [], 0
    for gap_ms in gaps_ms:  # of time that the anchor was awake
        left_ns = ms(gap_ms)
        for from_ns, to_ns in together:
            if at_ns <= from_ns < at_ns + left_ns:
                left_ns -= from_ns - at_ns
                at_ns = to_ns
        at_ns += left_ns
        beats_ns.append(at_ns)
    assert simulate(beats_ns, together, beats_ns[-1]) == []


@given(gaps, lengths)
def test_a_dead_anchor_is_failed_in_time(
    gaps_ms: list[int], lengths_ms: list[tuple[int, int]]
) -> None:
    beats_ns = [ms(at_ms) for at_ms in accumulate(gaps_ms)]
    died_ns, stalled = beats_ns[-1], stalls(lengths_ms)
    until_ns = max(died_ns, *(to_ns for _, to_ns in stalled), 0) + ms(1_000)
    found = simulate(beats_ns, stalled, until_ns)
    assert len(found) == 1
    stalled_ns = sum(to_ns - from_ns for from_ns, to_ns in stalled if to_ns > died_ns)
    took_ns = found[0] - died_ns
    assert ms(SILENCE_MS) <= took_ns <= ms(BUDGET_MS) + stalled_ns


def test_a_controller_that_is_always_late_still_finds_the_dead() -> None:
    served = fleet()
    served.heartbeat("edge1", 0, BEAT)
    for _ in range(12):
        assert served.next_check_ns is not None
        if served.check(served.next_check_ns + ms(1_000)):
            return
    pytest.fail("not found")


# Replay

names = st.sampled_from(POINTS)
providers = st.sampled_from(["operator", "acme"])
requests = st.one_of(
    st.tuples(st.just("register"), names, providers, st.integers(1, 3)),
    st.tuples(st.just("drain"), names, providers),
    st.tuples(st.just("deregister"), names, providers),
    st.tuples(st.just("heartbeat"), names, st.sampled_from(["boot1", "boot2"])),
    st.tuples(st.just("check")),
    st.tuples(st.just("suspect"), names),
    st.tuples(st.just("answered"), names),
)


def ask(served: Fleet, request: tuple[object, ...], now_ns: int) -> tuple[AnchorEvent, ...]:
    match request:
        case ("register", str(name), str(provider), int(slots)):
            return served.register(anchor(name, slots), provider)
        case ("drain", str(name), str(provider)):
            return served.drain(name, provider)
        case ("deregister", str(name), str(provider)):
            return served.deregister(name, provider)
        case ("heartbeat", str(name), str(boot_id)):
            return served.heartbeat(name, now_ns, replace(BEAT, boot_id=boot_id))
        case ("suspect", str(name)):
            return served.suspect(name, "connection refused", now_ns)
        case ("answered", str(name)):
            return served.answered(name, now_ns)
    return served.check(now_ns)


def durable(served: Fleet) -> list[object]:
    return [(s.anchor, s.provider, s.state, s.failure) for s in served.statuses()]


@given(st.lists(st.tuples(requests, st.integers(0, 150), st.booleans()), max_size=60))
def test_the_journal_alone_tells_the_same_story(
    history: list[tuple[tuple[object, ...], int, bool]],
) -> None:
    served, journal = fleet(), list[AnchorEvent]()
    waiting: list[AnchorEvent] = []
    now_ns = 0
    for request, passed_ms, written in history:
        now_ns += ms(passed_ms)
        before = durable(served)
        with suppress(FleetError):
            waiting += ask(served, request, now_ns)
        assert durable(served) == before  # decisions change nothing durable
        if written:
            journal += fold(served, tuple(waiting))
            waiting = []
    again = fleet()
    fold(again, tuple(journal))
    assert durable(again) == durable(served)
    assert dict(again.anchors) == dict(served.anchors)
    for name in POINTS:
        told = [event for event in journal if getattr(event, "name", None) == name]
        assert again.state(name) is served.state(name)
        assert again.state(name) is not AnchorState.DOWN or isinstance(
            next(e for e in reversed(told) if not isinstance(e, AnchorDraining)), AnchorFailed
        )
