"""Whether results support a conclusion: equal versions, a difference beyond the spread, a fit that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from refit.report.refits.points import Point
from refit.report.refits.run_spread import MIN_SAMPLES, Samples, exceeds_spread, half_width, median_of
from refit.report.refits.time_fit import Fit

MAX_CV = 0.2
"""Above this standard deviation over the mean, refits are too noisy for a conclusion."""

MAX_FIT_ERROR = 0.15
"""The largest relative deviation of a fit from which a conclusion is drawn."""

Figures = Callable[[Point], Samples]
"""What is compared of a scenario: of each run, one figure for each measured refit."""


def times(point: Point) -> Samples:
    """Seconds of each measured refit, by run."""
    return point.samples_s


def unfit_to_compare(points: Sequence[Point]) -> str | None:
    """Why no conclusion can be drawn from these scenarios together: other versions or GPUs, or noisy refits."""
    for name in dict.fromkeys(name for point in points for name in point.conditions):
        values = dict.fromkeys(point.conditions.get(name, "none") for point in points)
        if len(values) > 1:
            return f"{name} differs: {' / '.join(values)}"
    for point in points:
        if point.cv > MAX_CV:
            return f"the refits of {point.name} vary by {_over(point.cv)} % (cv), more than {100 * MAX_CV:.0f} %"
    return None


def _over(share: float) -> str:
    """A share above a limit of whole percent, as percent: rounded up, so that it does not read like the limit."""
    return f"{math.ceil(1000 * share) / 10:g}"


def no_difference(first: Sequence[Point], second: Sequence[Point], figures: Figures = times) -> str | None:
    """Why these results do not show that one group differs from the other; None where they do.

    Each scenario of one group must differ from each of the other by more than their spread, in one direction.
    """
    if reason := unfit_to_compare([*first, *second]) or _too_few([*first, *second]):
        return reason
    directions = set()
    for one in first:
        for other in second:
            if not exceeds_spread(figures(one), figures(other)):
                return f"the difference between {one.name} and {other.name} is within the spread of their refits"
            directions.add(median_of(figures(one)) > median_of(figures(other)))
    return "not all of these scenarios agree on which is faster" if len(directions) > 1 else None


def not_equal(points: Sequence[Point], tolerance: float, figures: Figures = times) -> str | None:
    """Why these results do not show that figures are equal within `tolerance`, a share; None where they do."""
    if reason := unfit_to_compare(points) or _too_few(points):
        return reason
    for point in points:
        if half_width(figures(point)) > tolerance * median_of(figures(point)):
            return f"the spread of the refits of {point.name} hides differences of {100 * tolerance:.0f} %"
    return None


def _too_few(points: Sequence[Point]) -> str | None:
    few = next((point for point in points if min(map(len, point.samples_s), default=0) < MIN_SAMPLES), None)
    if few is None:
        return None
    run = "a run with " if len(few.samples_s) > 1 else ""
    return f"{few.name} has {run}fewer than {MIN_SAMPLES} measured refits"


def poor_fit(fit: Fit, num_scenarios: int) -> str | None:
    """Why a fit is not good enough for a conclusion; None where it is."""
    if num_scenarios == 2:
        return "2 scenarios, which any two costs fit: run a third size to test it"
    if fit.worst_error > MAX_FIT_ERROR:
        return (
            f"the best fit to {num_scenarios} scenarios is off by {_over(fit.worst_error)} %, more than "
            f"{100 * MAX_FIT_ERROR:.0f} %"
        )
    return None
