"""Quantiles and intervals: what turns samples into figures with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOOTSTRAP_RESAMPLES = 2_000
CONFIDENCE = 0.95
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


def quantiles(values: ArrayLike, names: Sequence[str] = tuple(_PERCENTILES)) -> dict[str, float]:
    """The named quantiles (p50, p90, p99, max), interpolated; empty samples give NaN."""
    samples = np.asarray(values, float)
    if not samples.size:
        return dict.fromkeys(names, math.nan)
    found = np.percentile(samples, [_PERCENTILES[name] for name in names])
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def median_interval(values: ArrayLike, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the median, 95 %; (NaN, NaN) for an empty sample.

    The same values and seed give the same interval.
    """
    samples = np.asarray(values, float)
    if not samples.size:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    picks: NDArray[np.int64] = rng.integers(samples.size, size=(BOOTSTRAP_RESAMPLES, samples.size))
    medians = np.median(samples[picks], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Exact interval for a probability (Clopper and Pearson 1934), 95 %.

    With no success, or nothing but successes, only one side is open and takes all of the 5 %:
    0 of 30 still allows 9.5 %, 0 of 300 about 1 %. No trials tell nothing: (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if not trials:
        return 0.0, 1.0
    tail = (1 - CONFIDENCE) / (2 if 0 < successes < trials else 1)
    low, high = 0.0, 1.0
    if successes > 0:
        # P(X >= successes | low) = tail
        low = _solve(lambda p: 1 - _binomial_cdf(successes - 1, trials, p), tail)
    if successes < trials:
        # P(X <= successes | high) = tail, falling in p
        high = 1 - _solve(lambda q: _binomial_cdf(successes, trials, 1 - q), tail)
    return low, high


def _binomial_cdf(most: int, trials: int, p: float) -> float:
    """P(X <= most) for X binomial, summed from logarithms of its terms."""
    if p <= 0:
        return 1.0
    if p >= 1:
        return 1.0 if most >= trials else 0.0
    log_p, log_q = math.log(p), math.log1p(-p)
    total = math.lgamma(trials + 1)
    terms = (
        total - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(most + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _solve(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises on (0, 1) takes `value`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2
