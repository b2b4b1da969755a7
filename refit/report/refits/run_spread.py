"""The runs of one scenario taken together: which of them count, how far apart they are, what differs beyond that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from refit.results.outcomes import Outcome
from refit.results.stats import Summary
from refit.results.status import Status

MIN_SAMPLES = 3
"""With fewer samples in a run, spread is not judged."""

Samples = Sequence[Sequence[float]]
"""What the runs of a scenario measured: of each run that counts, one figure per refit or step."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """A scenario and its outcomes: one, or those of all its runs where it `has_runs` of its own (`--num-runs`)."""

    name: str
    outcomes: tuple[Outcome, ...]
    has_runs: bool

    @property
    def counted(self) -> tuple[Outcome, ...]:
        """The runs that ended well. Of a scenario without runs of its own, its outcome, however it ended."""
        return tuple(run for run in self.outcomes if run.status is Status.OK or not self.has_runs)

    @property
    def first(self) -> Outcome:
        """The first run that counts; the first of all where none does."""
        return next(iter(self.counted), self.outcomes[0])

    @property
    def share_ok(self) -> float:
        """The share of its runs that ended well, 0 to 1."""
        return sum(run.status is Status.OK for run in self.outcomes) / len(self.outcomes)

    @property
    def median_s(self) -> float | None:
        """The refit: the median over the runs that count of each run's median. None where none of them has times."""
        medians = [run.median_s for run in self.counted if run.median_s]
        return statistics.median(medians) if medians else None

    @property
    def samples_s(self) -> Samples:
        """Seconds of the measured refits of each run that counts."""
        tested = [run.tested for run in self.counted]
        return [engine.measured_s for engine in tested if engine is not None and engine.measured_s]

    @property
    def measured(self) -> list[Summary]:
        """The times of the runs that ended well: of the refit, or of the training step where nothing is refitted."""
        ended = [run for run in self.outcomes if run.status is Status.OK]
        timed = [run.tested if run.planned.refits else run.train_step for run in ended]
        return [found.summary for found in timed if found is not None and found.summary is not None]

    @property
    def spread(self) -> float:
        """That of the runs' medians, (longest - shortest) / median. Raises ValueError where no run counts."""
        return spread([summary.median_s for summary in self.measured])

    @property
    def methods(self) -> str:
        """What moved the bytes of the runs that count: `nccl`, of several `nccl or gloo`."""
        return " or ".join(dict.fromkeys(run.method for run in self.counted or self.outcomes))

    @property
    def count(self) -> str:
        """`3 runs`, or `2 of 3 runs` where not all of them count."""
        return _count(len(self.measured), len(self.outcomes))


def by_scenario(outcomes: Iterable[Outcome]) -> list[Repeated]:
    """The scenarios in the order of their first outcomes. Those without runs of their own have one outcome each."""
    groups: dict[str | int, list[Outcome]] = {}
    for number, outcome in enumerate(outcomes):
        groups.setdefault(outcome.planned.run_of or number, []).append(outcome)
    return [
        Repeated(found[0].planned.run_of or found[0].planned.name, tuple(found), isinstance(key, str))
        for key, found in groups.items()
    ]


def exceeds_spread(old: Samples, new: Samples) -> bool | None:
    """Whether the medians of two scenarios differ by more than spread explains.

    They do where the intervals median +- `half_width` do not overlap. None where a run has fewer than MIN_SAMPLES, or
    a scenario no run.
    """
    if not old or not new or min(map(len, (*old, *new))) < MIN_SAMPLES:
        return None
    return abs(median_of(new) - median_of(old)) > half_width(old) + half_width(new)


def beyond_text(exceeds: bool | None) -> str:
    """What tables print for `exceeds_spread`."""
    return {True: "yes", False: "no", None: "-"}[exceeds]


def half_width(runs: Samples) -> float:
    """Half the width of the interval around a scenario's median: within a run and between runs, whichever is more.

    Within: the widest `notch`. Between: the distance of the farthest run's median, 0 for a single run. Of normally
    distributed medians, 3 runs against 3 of equal speed differ beyond the second in 4 % of cases, 2 against 2 in 33 %
    (tests/report/refits/test_run_spread.py).
    """
    median = median_of(runs)
    return max(*map(notch, runs), *(abs(statistics.median(run) - median) for run in runs))


def notch(samples: Sequence[float]) -> float:
    """1.57 x interquartile range / sqrt(n), half the width of the interval around a run's median.

    From McGill, Tukey and Larsen, "Variations of Box Plots" (1978): where two such intervals do not overlap, the
    medians differ. This is about a 95 % test and robust against one outlier.
    """
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return 1.57 * (upper - lower) / math.sqrt(len(samples))


def median_of(runs: Samples) -> float:
    """The median over runs of each run's median."""
    return statistics.median(map(statistics.median, runs))


def spread(figures: Sequence[float]) -> float:
    """(Largest - smallest) / median. Raises ValueError for no figures."""
    return (max(figures) - min(figures)) / statistics.median(figures)


def run_spread_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A heading and a line for each scenario that was to run several times; empty where none was."""
    lines = spread_lines(outcomes)
    return ["Spread between runs:", "--------------------", *lines, ""] if lines else []


def spread_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each scenario that was to run several times."""
    return [times_line(scenario) for scenario in by_scenario(outcomes) if scenario.has_runs]


def times_line(scenario: Repeated) -> str:
    """The `spread_line` of a scenario's own times, of which the median counts; of refits `NAME over nccl: ...`."""
    if scenario.first.planned.refits:
        scenario = replace(scenario, name=f"{scenario.name} over {scenario.methods}")
    return spread_line(scenario, scenario.measured, [summary.median_s for summary in scenario.measured])


def spread_line(scenario: Repeated, measured: Sequence[Summary], figures_s: Sequence[float], what: str = "") -> str:
    """`NAME: 45.20 ms, median of 3 runs (44.90, 45.20, 46.10), spread 2.7 %; within a run up to 1.1 % (cv)`.

    `figures_s` has one time for each run in `measured`; `what` of the run it is where not its median: `the means of `.
    """
    num_runs = len(scenario.outcomes)
    if len(measured) < 2:
        return f"{scenario.name}: no spread, {len(measured)} of {num_runs} runs ended with a time that counts"
    each = ", ".join(f"{1e3 * seconds:.2f}" for seconds in figures_s)
    within = max(summary.cv for summary in measured)
    return (
        f"{scenario.name}: {1e3 * statistics.median(figures_s):.2f} ms, median of {what}"
        f"{_count(len(measured), num_runs)} ({each}), spread {100 * spread(figures_s):.1f} %; "
        f"within a run up to {100 * within:.1f} % (cv)"
    )


def _count(num_counted: int, num_runs: int) -> str:
    return f"{num_counted} of {num_runs} runs" if num_counted < num_runs else f"{num_runs} run{'s' * (num_runs > 1)}"


def left_out_lines(scenario: Repeated, counted: Iterable[Outcome]) -> list[str]:
    """A line for each run of a scenario with runs of its own that is not among `counted`, with the reason."""
    if not scenario.has_runs:
        return []
    names = {run.planned.name for run in counted}
    return [
        f"{run.planned.name} is not counted: {run.status.text}: {run.reason or 'it has no measured times'}"
        for run in scenario.outcomes
        if run.planned.name not in names
    ]
