"""The spread between several runs of the same scenario, for a sweep that repeats whole scenarios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from refit.results.outcomes import Outcome
from refit.results.status import Status


def run_spread_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A heading and a line for each scenario that was to run several times; empty where none was."""
    runs: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.planned.run_of:
            runs.setdefault(outcome.planned.run_of, []).append(outcome)
    if not runs:
        return []
    return ["Spread between runs:", "--------------------", *(_line(name, found) for name, found in runs.items()), ""]


def _line(name: str, runs: Sequence[Outcome]) -> str:
    """`NAME: 45.20 ms, median of 3 runs (44.90, 45.20, 46.10), spread 2.7 %; within a run up to 1.1 % (cv)`.

    The spread is that of the runs' medians, (longest - shortest) / median. Only runs that ended well count.
    """
    summaries = [run.tested.summary for run in runs if run.status is Status.OK and run.tested]
    measured = [summary for summary in summaries if summary]
    if len(measured) < 2:
        return f"{name}: no spread, {len(measured)} of {len(runs)} runs ended with a verified time"
    medians_ms = [1e3 * summary.median_s for summary in measured]
    median_ms = statistics.median(medians_ms)
    count = f"{len(measured)} runs" if len(measured) == len(runs) else f"{len(measured)} of {len(runs)} runs"
    each = ", ".join(f"{value:.2f}" for value in medians_ms)
    spread = (max(medians_ms) - min(medians_ms)) / median_ms
    within = max(summary.cv for summary in measured)
    return (
        f"{name}: {median_ms:.2f} ms, median of {count} ({each}), spread {100 * spread:.1f} %; "
        f"within a run up to {100 * within:.1f} % (cv)"
    )
