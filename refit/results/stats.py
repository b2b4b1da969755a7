"""Statistics over the iterations of one engine. Every sample is the time of the slowest rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Seconds over the measured iterations. `cv` is the standard deviation over the mean, without unit.

    `drift` is the median of the last third over the median of the first third, minus 1; 0 with fewer than 6 samples.
    """

    mean_s: float
    min_s: float
    max_s: float
    median_s: float
    p95_s: float
    cv: float
    drift: float


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
