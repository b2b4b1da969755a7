"""Statistics over the iterations of one engine. Every sample is the time of the slowest rank."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
STABLE_WIDTH = 0.02
"""A median is stable where both ends of its confidence interval lie within this share of it."""

LEAST_FOR_INTERVAL = 6
"""Fewest samples whose extremes enclose the median with CONFIDENCE: 1 - 2 / 2^6 = 0.97, with 5 samples it is 0.94."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Times over the measured iterations."""

    mean_s: float
    min_s: float
    max_s: float
    median_s: float
    p95_s: float
    """The 95th percentile."""
    cv: float
    """Standard deviation over mean."""
    drift: float
    """Median of the last third over that of the first third, minus 1; 0 with fewer than 6 samples."""


def summarise(samples_s: Sequence[float]) -> Summary:
    """Summarise times in seconds. Raises ValueError for no samples."""
    if not samples_s:
        raise ValueError("no samples")
    mean = statistics.fmean(samples_s)
    return Summary(
        mean_s=mean,
        min_s=min(samples_s),
        max_s=max(samples_s),
        median_s=statistics.median(samples_s),
        p95_s=percentile(samples_s, 95),
        cv=statistics.pstdev(samples_s) / mean if mean else 0.0,
        drift=_drift(samples_s),
    )


@dataclass(frozen=True, slots=True)
class Stability:
    """How well `num_refits` samples give the median."""

    num_refits: int
    is_stable: bool = False
    """`width` is at most 0.02."""
    low_s: float | None = None
    """Lower end of the median's confidence interval. Without enough samples it is None, as are the next three."""
    high_s: float | None = None
    """Its upper end."""
    confidence: float | None = None
    """The interval's own: at least 0.95 where there are 6 samples or more."""
    width: float | None = None
    """Distance of the farther end from the median, as a share of the median."""


def stability(samples_s: Sequence[float]) -> Stability:
    """The median's confidence interval from order statistics, which assumes no distribution.

    For n independent samples of a continuous distribution, the k-th smallest and the k-th largest enclose its median
    with probability 1 - 2 P(B < k), where B is binomial with n trials of 1/2 (David and Nagaraja, Order Statistics,
    3rd edition, section 7.1; for benchmarks Hoefler and Belli, SC 2015, rule 5). Taken is the largest k that reaches
    CONFIDENCE. Where sampling stops at the first narrow interval, the true confidence is somewhat lower.
    """
    ordered = sorted(samples_s)
    rank, confidence = _interval_rank(len(ordered))
    if rank == 0:
        return Stability(len(ordered))
    median, low, high = statistics.median(ordered), ordered[rank - 1], ordered[-rank]
    width = max(median - low, high - median) / median if median else math.inf
    return Stability(len(ordered), width <= STABLE_WIDTH, low, high, confidence, width)


@functools.cache
def _interval_rank(num_samples: int) -> tuple[int, float]:
    """The largest k whose order statistics enclose the median with CONFIDENCE, and with which confidence they do.

    k is 0 where there are too few samples.
    """
    # In whole numbers: beyond 1,000 samples 2^n is no float.
    tail, ways, rank = 0, 1, 0
    while 100 * 2 * (tail + ways) <= round(100 * (1 - CONFIDENCE)) * 2**num_samples:
        tail += ways
        ways = ways * (num_samples - rank) // (rank + 1)
        rank += 1
    return rank, 1 - 2 * tail / 2**num_samples


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks (numpy's default, Hyndman and Fan 1996 definition 7)."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _drift(samples_s: Sequence[float]) -> float:
    third = len(samples_s) // 3
    if third < 2:
        return 0.0
    first = statistics.median(samples_s[:third])
    return statistics.median(samples_s[-third:]) / first - 1 if first else 0.0
