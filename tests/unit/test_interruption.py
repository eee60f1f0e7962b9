"""Loss, duplicates, reordering and outages of hand-made and of random sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.interruption import NO_SITE, Interruption, Trace, build_trace, interruption

INTERVAL_NS = 1_000_000
DELAY_NS = 100_000
WAITING_TIME_MS = 300
T0 = 1_700_000_000_000_000_000


def trace(sent: int, arrivals: list[tuple[int, int]], send_ns: list[int] | None = None) -> Trace:
    """`arrivals` are (sequence number, delay in ns)."""
    times = np.array(send_ns if send_ns else [i * INTERVAL_NS for i in range(sent)], np.int64) + T0
    seq = np.array([number for number, _ in arrivals], np.uint32)
    delay_ns = np.array([delay for _, delay in arrivals], np.int64)
    site = np.ones(len(seq), np.uint8)
    return build_trace(times, seq, site, times[seq] + delay_ns, WAITING_TIME_MS)


def arriving(*numbers: int) -> list[tuple[int, int]]:
    return [(number, DELAY_NS) for number in numbers]


def whole(one: Trace) -> Interruption:
    return interruption(one, slice(0, len(one.send_ns)), INTERVAL_NS)


def test_nothing_lost() -> None:
    figures = whole(trace(5, arriving(0, 1, 2, 3, 4)))
    assert (figures.sent, figures.received, figures.lost) == (5, 5, 0)
    assert figures.loss_outage_ms == figures.gap_outage_ms == 0
    assert figures.loss_periods == figures.longest_loss_period_packets == 0


def test_two_loss_periods_and_their_distances() -> None:
    figures = whole(trace(10, arriving(0, 1, 4, 5, 6, 8, 9)))
    assert figures.lost == 3
    assert figures.loss_periods == 2
    assert figures.longest_loss_period_packets == 2
    assert figures.loss_distances.tolist() == [1, 4]
    assert figures.loss_outage_ms == figures.gap_outage_ms == 3.0


def test_losses_at_both_ends() -> None:
    figures = whole(trace(6, arriving(2, 3)))
    assert figures.loss_outage_ms == figures.gap_outage_ms == 4.0


def test_everything_lost() -> None:
    figures = whole(trace(4, []))
    assert (figures.received, figures.lost, figures.gap_outage_ms) == (0, 4, 4.0)


def test_no_packets() -> None:
    figures = interruption(trace(4, arriving(0)), slice(2, 2), INTERVAL_NS)
    assert (figures.sent, figures.lost, figures.gap_outage_ms) == (0, 0, 0)


def test_a_window_cuts_a_loss_period() -> None:
    one = trace(10, arriving(0, 1, 8, 9))
    first = interruption(one, slice(0, 5), INTERVAL_NS)
    second = interruption(one, slice(5, 10), INTERVAL_NS)
    assert (first.gap_outage_ms, second.gap_outage_ms) == (3.0, 3.0)


def test_sends_missed_within_an_outage_make_the_outages_disagree() -> None:
    send_ns = [0, 1_000_000, 2_000_000, 12_000_000, 13_000_000]
    figures = whole(trace(5, arriving(0, 1, 4), send_ns))
    assert figures.loss_outage_ms == 2.0
    assert figures.gap_outage_ms == 11.0
    assert figures.outages_disagree(INTERVAL_NS)


def test_a_gap_in_the_sending_is_no_outage() -> None:
    figures = whole(trace(4, arriving(0, 1, 2, 3), [0, 1_000_000, 50_000_000, 51_000_000]))
    assert figures.gap_outage_ms == 0


def test_copies_after_the_first_are_duplicates() -> None:
    one = trace(3, [*arriving(0, 1, 2), (1, 2 * DELAY_NS), (1, 3 * DELAY_NS)])
    assert whole(one).duplicated == 2
    assert whole(one).received == 3
    assert one.recv_ns[1] - one.send_ns[1] == DELAY_NS


def test_one_packet_overtaken_by_two_is_one_reordered() -> None:
    one = trace(5, [(0, DELAY_NS), (1, 3 * INTERVAL_NS - 1), *arriving(2, 3, 4)])
    assert np.flatnonzero(one.reordered).tolist() == [1]


def test_a_duplicate_is_not_reordered() -> None:
    one = trace(4, [*arriving(0, 1, 2, 3), (0, 3 * INTERVAL_NS)])
    assert not one.reordered.any()


def test_after_the_waiting_time_is_late_and_lost() -> None:
    waiting_ns = WAITING_TIME_MS * 1_000_000
    one = trace(3, [(0, DELAY_NS), (1, waiting_ns + 1), (2, waiting_ns)])
    figures = whole(one)
    assert (figures.received, figures.lost, figures.late, figures.reordered) == (2, 1, 1, 0)


def test_sites_are_those_of_first_copies() -> None:
    send_ns = np.arange(3, dtype=np.int64) * INTERVAL_NS
    seq = np.array([1, 0, 1], np.uint32)
    site = np.array([7, 5, 6], np.uint8)
    recv_ns = np.array([9, 1, 8], np.int64) * INTERVAL_NS
    one = build_trace(send_ns, seq, site, recv_ns, WAITING_TIME_MS)
    assert one.site.tolist() == [5, 6, NO_SITE]


def test_what_was_never_sent_cannot_be_received() -> None:
    with pytest.raises(ValueError, match="sequence number 3 received, 3 packets sent"):
        build_trace(
            np.arange(3, dtype=np.int64),
            np.array([3], np.uint32),
            np.zeros(1, np.uint8),
            np.array([9], np.int64),
            WAITING_TIME_MS,
        )


@given(
    copies=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    delays_us=st.lists(st.integers(1, 400_000), min_size=180, max_size=180),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_figures_add_up(copies: list[int], delays_us: list[int], cuts: tuple[int, int]) -> None:
    numbers = [number for number, count in enumerate(copies) for _ in range(count)]
    arrivals = [(n, 1000 * delay) for n, delay in zip(numbers, delays_us, strict=False)]
    one = trace(len(copies), arrivals)
    figures = whole(one)
    assert figures.sent == len(copies)
    assert figures.sent == figures.received + figures.lost
    assert figures.late <= figures.lost
    assert figures.duplicated == sum(max(0, count - 1) for count in copies)
    assert figures.reordered < max(1, figures.received)
    assert figures.loss_periods <= figures.lost
    assert figures.gap_outage_ms == pytest.approx(figures.loss_outage_ms)
    low, high = sorted(min(cut, len(copies)) for cut in cuts)
    parts = [slice(0, low), slice(low, high), slice(high, len(copies))]
    pieces = [interruption(one, part, INTERVAL_NS) for part in parts]
    for name in ("sent", "received", "lost", "duplicated", "reordered", "late"):
        assert sum(getattr(piece, name) for piece in pieces) == getattr(figures, name)
    assert sum(piece.gap_outage_ms for piece in pieces) == pytest.approx(figures.gap_outage_ms)
