"""How refit times grow with bytes: one fit for each mode, method and model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from refit.report.refits import evidence
from refit.report.refits.points import Point
from refit.report.refits.time_fit import Fit, FitError, Load, fit_time


@dataclass(frozen=True, slots=True)
class Scaling:
    """The loads of one mode and method, and their fit. `reason` is why no conclusion is drawn from it, or why there is
    none."""

    mode: str
    method: str
    loads: tuple[Load, ...]
    fit: Fit | None
    reason: str | None


def scalings(points: Sequence[Point]) -> list[Scaling]:
    """One for each mode and method, in the order of `points`; those without bytes over the wire are left out."""
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.mode, point.method].append(point)
    return [_scaling(mode, method, group) for (mode, method), group in groups.items()]


def _scaling(mode: str, method: str, group: Sequence[Point]) -> Scaling:
    loads = tuple(
        Load(point.busiest, point.num_transfers / point.destination.world_size, point.median_s)
        for point in group
        if point.num_transfers is not None and point.busiest
    )
    try:
        fit = fit_time(loads)
    except FitError as error:
        return Scaling(mode, method, loads, None, f"no fit: {error}")
    reason = evidence.unfit_to_compare(group) or evidence.poor_fit(fit, len(loads))
    return Scaling(mode, method, loads, fit, f"no conclusion: {reason}" if reason else None)
