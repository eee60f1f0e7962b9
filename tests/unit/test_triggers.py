"""Triggers: who moves, why, and that nobody hops about, whatever is reported."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.clock import NS_PER_MS
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorEvent,
    AnchorFailed,
    AnchorRecovered,
    Heartbeat,
)
from controlplane.triggers import (
    Hysteresis,
    Pressure,
    Trigger,
    Triggers,
    TriggerSettings,
    should_move,
)

SETTINGS = TriggerSettings(
    load_high=0.9,
    load_low=0.6,
    latency_high_ms=200.0,
    latency_low_ms=150.0,
    hold_ms=100,
    period_ms=1_000,
    max_share=0.2,
    dwell_ms=5_000,
)
SESSIONS = [f"s{number}" for number in range(20)]


def ms(instant_ms: int) -> int:
    return instant_ms * NS_PER_MS


def beat(load: float = 0.0, latency_ms: float | None = None) -> Heartbeat:
    return Heartbeat(boot_id="boot", load=load, ready_aisis=frozenset(), latency_ms=latency_ms)


def under_pressure(load: float) -> tuple[Triggers, list[Pressure]]:
    triggers = Triggers(SETTINGS)
    assert triggers.heartbeat("edge1", beat(load), 0) == []
    return triggers, triggers.heartbeat("edge1", beat(load), ms(100))


def test_a_value_is_high_after_a_while_and_until_it_is_low() -> None:
    signal = Hysteresis(high=10, low=5, hold_ns=100)
    history = [
        *((0, 10, False), (50, 9.9, False), (60, 10, False), (159, 11, False), (160, 11, True)),
        *((200, 5.1, True), (300, 5, False), (301, 10, False), (400, 10, False), (401, 10, True)),
    ]
    for now_ns, value, raised in history:
        assert signal.update(value, now_ns) is raised, (now_ns, value)


@pytest.mark.parametrize(
    ("load", "leave"),
    [(0.9, 4), (1.0, 4), (0.65, 1)],  # at most a fifth of 20; down to 0.6 no more than needed
)
def test_no_more_leave_than_the_load_calls_for(load: float, leave: int) -> None:
    triggers, (pressure,) = under_pressure(0.9)
    if load < 0.9:
        (pressure,) = triggers.heartbeat("edge1", beat(load), ms(150))
    assert pressure.trigger is Trigger.LOAD
    assert triggers.choose(pressure, SESSIONS, ms(150)) == SESSIONS[:leave]


def test_the_next_period_takes_others() -> None:
    triggers, (pressure,) = under_pressure(1.0)
    chosen = triggers.choose(pressure, SESSIONS, ms(100))
    assert triggers.heartbeat("edge1", beat(1.0), ms(1_099)) == []
    assert triggers.choose(pressure, SESSIONS, ms(1_099)) == []
    (pressure,) = triggers.heartbeat("edge1", beat(1.0), ms(1_100))
    chosen += triggers.choose(pressure, SESSIONS, ms(1_100))
    assert chosen == SESSIONS[:8]


def test_a_slow_anchor_is_left_too() -> None:
    triggers = Triggers(SETTINGS)
    triggers.heartbeat("edge1", beat(0.1, latency_ms=250.0), 0)
    assert triggers.heartbeat("edge1", beat(0.1), ms(100)) == []  # it does not say
    (pressure,) = triggers.heartbeat("edge1", beat(0.1, latency_ms=250.0), ms(150))
    assert pressure.trigger is Trigger.LATENCY
    assert triggers.choose(pressure, SESSIONS, ms(150)) == SESSIONS[:4]
    assert triggers.choose(pressure, ["s5"], ms(1_150)) == ["s5"]  # one may always


@pytest.mark.parametrize(
    ("event", "trigger"),
    [
        (AnchorFailed("edge1", "silent"), Trigger.FAILURE),
        (AnchorDraining("edge1"), Trigger.DRAIN),
        (AnchorDeregistered("edge1"), Trigger.DRAIN),
        (AnchorRecovered("edge1"), None),
    ],
)
def test_what_happens_to_an_anchor_and_what_its_sessions_do(
    event: AnchorEvent, trigger: Trigger | None
) -> None:
    triggers, _ = under_pressure(1.0)
    assert triggers.of_event(event) is trigger
    pressed = triggers.heartbeat("edge1", beat(1.0), ms(150))
    assert bool(pressed) is (trigger is None)  # what was reported of an anchor goes with it


def test_a_handover_moves_a_session_at_once_or_when_it_has_dwelt() -> None:
    triggers = Triggers(SETTINGS)
    assert triggers.handover(["s1", "s2"], 0) == ["s1", "s2"]
    triggers.moved("s1", ms(10))
    assert triggers.handover(["s1", "s2"], ms(1_000)) == ["s2"]  # s2 found nothing better
    assert triggers.handover(["s1"], ms(2_000)) == []
    assert triggers.next_due_ns() == ms(5_010)
    assert triggers.due(ms(5_009)) == []
    assert triggers.due(ms(5_010)) == ["s1"]
    assert triggers.next_due_ns() is None
    assert triggers.due(ms(9_000)) == []


def test_one_that_moves_again_keeps_nobody_else_dwelling() -> None:
    triggers = Triggers(SETTINGS)
    for session_id, at_ms in (("s1", 0), ("s2", 1_000), ("s1", 4_000)):
        triggers.moved(session_id, ms(at_ms))
    assert triggers.handover(["s1", "s2"], ms(6_000)) == ["s2"]


@pytest.mark.parametrize(
    ("here", "there", "moves"),
    [(1.0, 0.8, False), (1.0, 0.79, True), (0.5, 0.6, False), (None, 99.0, True)],
)
def test_a_move_must_be_worth_it_unless_the_present_anchor_will_not_do(
    here: float | None, there: float, moves: bool
) -> None:
    assert should_move(here, there, margin=0.2) is moves


def test_settings_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(ValueError, match="load_low"):
        TriggerSettings(load_low=0.95)
    with pytest.raises(ValueError, match="latency_low_ms"):
        TriggerSettings(latency_low_ms=200.0)
    with pytest.raises(ValueError, match="max_share"):
        TriggerSettings(max_share=0.0)
    with pytest.raises(ValueError, match="period_ms"):
        TriggerSettings(period_ms=0)


loads = st.sampled_from([0.0, 0.6, 0.75, 0.9, 1.0])
reports = st.lists(
    st.tuples(
        st.integers(1, 400),  # ms since the one before
        st.sampled_from(["edge1", "edge2"]),
        loads,
        st.sampled_from([None, 100.0, 250.0]),
        st.lists(st.sampled_from(SESSIONS), max_size=3),  # handed over
    ),
    max_size=80,
)


@given(reports)
def test_nobody_hops_whatever_is_reported(
    history: list[tuple[int, str, float, float | None, list[str]]],
) -> None:
    """Two anchors that push sessions to and fro, as fast as they are allowed to."""
    triggers, now_ms = Triggers(SETTINGS), 0
    at = {session_id: ("edge1", "edge2")[i % 2] for i, session_id in enumerate(SESSIONS)}
    moves: defaultdict[str, list[int]] = defaultdict(list)
    waves: defaultdict[str, list[int]] = defaultdict(list)

    def move(session_ids: list[str]) -> None:
        for session_id in session_ids:
            at[session_id] = "edge2" if at[session_id] == "edge1" else "edge1"
            moves[session_id].append(now_ms)
            triggers.moved(session_id, ms(now_ms))

    for passed_ms, anchor, load, latency_ms, handed_over in history:
        now_ms += passed_ms
        there = [session_id for session_id, where in at.items() if where == anchor]
        for pressure in triggers.heartbeat(anchor, beat(load, latency_ms), ms(now_ms)):
            chosen = triggers.choose(pressure, there, ms(now_ms))
            assert set(chosen) <= set(there)
            assert len(chosen) <= max(1, len(there) * SETTINGS.max_share)
            waves[anchor].append(now_ms)
            move(chosen)
        move(triggers.handover(dict.fromkeys(handed_over), ms(now_ms)))
        move(triggers.due(ms(now_ms)))

    for instants, least_ms in [
        *((instants, SETTINGS.dwell_ms) for instants in moves.values()),
        *((instants, SETTINGS.period_ms) for instants in waves.values()),
    ]:
        assert all(after - before >= least_ms for before, after in pairwise(instants))


@given(st.lists(st.tuples(st.integers(0, 5_000), st.floats(0, 0.89)), max_size=50))
def test_nobody_moves_while_the_load_stays_below_the_upper_threshold(
    history: list[tuple[int, float]],
) -> None:
    triggers, now_ms = Triggers(SETTINGS), 0
    for passed_ms, load in history:
        now_ms += passed_ms
        assert triggers.heartbeat("edge1", beat(load, latency_ms=199.0), ms(now_ms)) == []


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(0.9, 1)), max_size=50))
def test_nobody_moves_for_peaks_shorter_than_the_hold_time(
    peaks: list[tuple[int, float]],
) -> None:
    triggers, now_ms = Triggers(SETTINGS), 0
    for length_ms, load in peaks:
        for passed_ms, value in ((0, load), (length_ms, load), (1, 0.89)):
            now_ms += passed_ms
            assert triggers.heartbeat("edge1", beat(value), ms(now_ms)) == []
