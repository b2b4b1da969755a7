"""Refits that send changes against the share of the weights that had changed, and where they take as long as full ones.

The shares are those of one run, in turn, or of several scenarios that differ in the share alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from refit.results.outcomes import Outcome
from refit.results.shares import full_refits, share_rows
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Point:
    """Refits of one share: the median, and the bytes as a share of those of a full refit."""

    share: float
    median_s: float
    byte_share: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """Points by share. `full_s` is the median of the full refits beside them, None where there were none."""

    title: str
    points: tuple[Point, ...]
    full_s: float | None

    @property
    def crossover(self) -> float | None:
        """The largest share up to which changes are faster, between two measured ones; None where there is none.

        Straight between points of log share and log time.
        """
        if self.full_s is None:
            return None
        for before, after in reversed(list(itertools.pairwise(self.points))):
            low, high, full = (math.log(seconds) for seconds in (before.median_s, after.median_s, self.full_s))
            if low < full <= high:
                part = (full - low) / (high - low)
                return math.exp(math.log(before.share) * (1 - part) + math.log(after.share) * part)
        return None

    @property
    def verdict(self) -> str:
        """What is faster, in words."""
        if self.full_s is None:
            return "no full refits to compare with"
        if self.crossover is not None:
            return f"as fast as full at {100 * self.crossover:.2g} % changed"
        faster = [point.median_s < self.full_s for point in self.points]
        if all(faster):
            return "faster than full at every share measured"
        return "slower than full at every share measured" if not any(faster) else "faster than full at some shares"


def curves_of(outcomes: Iterable[Outcome]) -> list[Curve]:
    """Those with at least two shares, of scenarios that are ok."""
    points: dict[Hashable, dict[float, Point]] = defaultdict(dict)
    full: dict[Hashable, list[float]] = defaultdict(list)
    for outcome in outcomes:
        scenario = outcome.result.scenario if outcome.result else None
        if outcome.status is not Status.OK or scenario is None or scenario.delta is None:
            continue
        what = "changed by optimizer steps" if scenario.sends_steps else scenario.delta.pattern.value
        key = (scenario.title, scenario.mode.value, outcome.method, what, scenario.model)
        for row in share_rows(outcome.refit):
            share = row.changed_share
            if share:
                asked = row.asked_share if row.asked_share is not None else share
                points[key][asked] = Point(share, row.median_s, row.byte_share)
        beside = full_refits(outcome.refit)
        if beside is not None and beside.median_s is not None:
            full[key].append(beside.median_s)
    return [_curve(key, list(found.values()), full[key]) for key, found in points.items() if len(found) > 1]


def _curve(key: Hashable, points: Sequence[Point], full: Sequence[float]) -> Curve:
    assert isinstance(key, tuple)
    title, mode, method, what, _ = key
    ordered = tuple(sorted(points, key=lambda point: point.share))
    return Curve(f"{title} {mode} over {method}, {what}", ordered, statistics.median(full) if full else None)


def shares_lines(outcomes: Iterable[Outcome]) -> list[str]:
    """`TP2 EP1 -> TP1 EP1 ... over gloo with delta, uniform: as fast as full at 24 % changed`, of each curve."""
    return [f"{curve.title}: {curve.verdict}" for curve in curves_of(outcomes)]
