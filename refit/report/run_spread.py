"""The spread between several runs of the same scenario, for a sweep that repeats whole scenarios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refit.results.outcomes import Outcome
from refit.results.stats import Summary
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Repeated:
    """A scenario and its outcomes: one, or those of all its runs where it `has_runs` of its own (`--num-runs`)."""

    name: str
    outcomes: tuple[Outcome, ...]
    has_runs: bool

    @property
    def measured(self) -> list[Summary]:
        """The times of the runs that ended well. Only they count."""
        tested = [run.tested for run in self.outcomes if run.status is Status.OK]
        return [engine.summary for engine in tested if engine is not None and engine.summary is not None]

    @property
    def spread(self) -> float:
        """That of the runs' medians, (longest - shortest) / median. Raises ValueError where no run counts."""
        medians = [summary.median_s for summary in self.measured]
        return (max(medians) - min(medians)) / statistics.median(medians)

    @property
    def count(self) -> str:
        """`3 runs`, or `2 of 3 runs` where not all of them count."""
        measured, num_runs = len(self.measured), len(self.outcomes)
        return f"{measured} of {num_runs} runs" if measured < num_runs else f"{num_runs} run{'s' * (num_runs > 1)}"


def by_scenario(outcomes: Iterable[Outcome]) -> list[Repeated]:
    """The scenarios in the order of their first outcomes. Those without runs of their own have one outcome each."""
    groups: dict[str | int, list[Outcome]] = {}
    for number, outcome in enumerate(outcomes):
        groups.setdefault(outcome.planned.run_of or number, []).append(outcome)
    return [
        Repeated(found[0].planned.run_of or found[0].planned.name, tuple(found), isinstance(key, str))
        for key, found in groups.items()
    ]


def run_spread_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A heading and a line for each scenario that was to run several times; empty where none was."""
    lines = spread_lines(outcomes)
    return ["Spread between runs:", "--------------------", *lines, ""] if lines else []


def spread_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each scenario that was to run several times."""
    return [_line(scenario) for scenario in by_scenario(outcomes) if scenario.has_runs]


def _line(scenario: Repeated) -> str:
    """`NAME: 45.20 ms, median of 3 runs (44.90, 45.20, 46.10), spread 2.7 %; within a run up to 1.1 % (cv)`."""
    measured = scenario.measured
    if len(measured) < 2:
        num_runs = len(scenario.outcomes)
        return f"{scenario.name}: no spread, {len(measured)} of {num_runs} runs ended with a verified time"
    medians_ms = [1e3 * summary.median_s for summary in measured]
    each = ", ".join(f"{value:.2f}" for value in medians_ms)
    within = max(summary.cv for summary in measured)
    return (
        f"{scenario.name}: {statistics.median(medians_ms):.2f} ms, median of {scenario.count} ({each}), "
        f"spread {100 * scenario.spread:.1f} %; within a run up to {100 * within:.1f} % (cv)"
    )
