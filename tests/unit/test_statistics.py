"""Intervals against published values and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.statistics import binomial_interval, median_interval, quantiles


def test_quantiles_of_a_known_sample() -> None:
    found = quantiles(range(101))
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_no_samples_give_nan() -> None:
    assert all(math.isnan(value) for value in quantiles([]).values())
    assert all(math.isnan(value) for value in median_interval([], seed=1))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 30, 0.0, 0.0950),
        (0, 300, 0.0, 0.00994),
        (30, 30, 0.9050, 1.0),
        (5, 10, 0.1871, 0.8129),
        (1, 20, 0.0013, 0.2487),
        (0, 0, 0.0, 1.0),
    ],
)
def test_binomial_interval_matches_tables(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert binomial_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 400), st.data())
def test_binomial_interval_is_symmetric_and_holds_the_share(
    trials: int, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = binomial_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert binomial_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        binomial_interval(3, 2)


def test_median_interval_is_reproducible_and_plausible() -> None:
    values = np.random.default_rng(5).normal(10, 2, 200)
    low, high = median_interval(values, seed=1)
    assert (low, high) == median_interval(values, seed=1)
    assert 9 < low < float(np.median(values)) < high < 11
    assert median_interval([4.0] * 30, seed=1) == (4.0, 4.0)
