"""Training steps as reports compare them: the runs of one scenario together, and what two runs differ in."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refit.config.registry import FORMATS
from refit.config.scenario import Scenario
from refit.config.steps import StepSettings
from refit.report.refits.points import median
from refit.report.refits.run_spread import Repeated, Samples, by_scenario, left_out_lines, spread_line
from refit.results.outcomes import Outcome
from refit.results.stats import Summary
from refit.results.status import Status
from refit.results.step import StepResult

LOSS_STEPS = 10
"""Steps of the curves that are compared."""

RANK_CAPACITY = "moe_expert_rank_capacity_factor"

SELECTOR = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "moe_enable_deepep", RANK_CAPACITY)
"""Fields of Megatron's configuration that choose the dispatcher and size its buffers."""


@dataclass(frozen=True, slots=True)
class StepRun:
    """The training steps of one run that ended well. `summary` is that of `result`."""

    outcome: Outcome
    scenario: Scenario
    result: StepResult
    summary: Summary

    @property
    def name(self) -> str:
        return self.outcome.planned.name


@dataclass(frozen=True, slots=True)
class Arm:
    """A scenario that trained, and its runs that ended well: one or more. Its figures are medians over these runs."""

    repeated: Repeated
    runs: tuple[StepRun, ...]

    @property
    def scenario(self) -> Scenario:
        return self.runs[0].scenario

    @property
    def steps(self) -> StepSettings:
        steps = self.scenario.steps
        assert steps is not None, "it trained"
        return steps

    @property
    def name(self) -> str:
        """Its dispatcher: `alltoall`, `flex/deepep`, also where the model has no experts."""
        return self.steps.dispatch.arm

    @property
    def overlap(self) -> str:
        """`overlap`, `overlap, delayed gradients`; empty without."""
        dispatch = self.steps.dispatch
        settings = {"overlap": dispatch.overlap, "delayed gradients": dispatch.delay_wgrad}
        return ", ".join(name for name, is_on in settings.items() if is_on)

    @property
    def where(self) -> str:
        """`kimi_k2 TP2 EP4`: model and layout, and Transformer Engine's layers where they are used."""
        return " ".join(filter(None, (self.scenario.model_title, self.scenario.source.title, self.engine)))

    @property
    def engine(self) -> str | None:
        """`TE` where Megatron-Core's layers are Transformer Engine's; models of transformers have their own layers."""
        source = self.scenario.source
        is_megatron = not FORMATS[source.format].is_transformers
        return "TE" if is_megatron and source.transformer_impl == "transformer_engine" else None

    @property
    def means_s(self) -> list[float]:
        """Each run's mean step."""
        return [run.summary.mean_s for run in self.runs]

    @property
    def mean_s(self) -> float:
        return statistics.median(self.means_s)

    @property
    def std_s(self) -> float:
        """The standard deviation of the steps of all runs: that within runs and that between them together."""
        within = statistics.fmean((run.summary.cv * run.summary.mean_s) ** 2 for run in self.runs)
        return math.sqrt(within + statistics.pvariance(self.means_s))

    @property
    def samples_s(self) -> Samples:
        """Seconds of each run's measured steps."""
        return [[sample.seconds for sample in run.result.measured] for run in self.runs]

    @property
    def num_measured(self) -> int:
        """Measured steps of all runs."""
        return sum(map(len, self.samples_s))

    @property
    def num_stalls(self) -> int:
        """Stalls of all runs."""
        return sum(run.result.num_stalls for run in self.runs)

    @property
    def tokens_per_s(self) -> float | None:
        return median(run.result.tokens_per_s for run in self.runs)

    @property
    def samples_per_s(self) -> float | None:
        """Sequences per second."""
        return median(run.result.samples_per_s for run in self.runs)

    @property
    def tflops_per_gpu(self) -> float | None:
        return median(run.result.tflops_per_gpu for run in self.runs)

    @property
    def peak_bytes(self) -> int | None:
        """That of the run with most."""
        return max((run.result.peak_bytes for run in self.runs if run.result.peak_bytes is not None), default=None)


def arms_of(outcomes: Iterable[Outcome]) -> list[Arm]:
    """The scenarios with training steps of at least one run that ended well, in the order of `by_scenario`."""
    arms = (Arm(each, tuple(filter(None, map(_run, each.outcomes)))) for each in by_scenario(outcomes))
    return [arm for arm in arms if arm.runs]


def _run(outcome: Outcome) -> StepRun | None:
    result, steps = outcome.result, outcome.train_step
    if result is None or result.scenario is None or result.scenario.steps is None or outcome.status is not Status.OK:
        return None
    return StepRun(outcome, result.scenario, steps, steps.summary) if steps and steps.summary else None


def cell_of(arm: Arm, **dispatch: Any) -> str:
    """What the arms of a cell have in common: the scenario with these settings of its dispatch in place of its own, and
    without where results go."""
    neutral = replace(arm.steps, dispatch=replace(arm.steps.dispatch, **dispatch))
    return repr(replace(arm.scenario, steps=neutral, run_name=None, output_dir=Path(), notes=()))


def run_lines(arms: Iterable[Arm]) -> list[str]:
    """Of scenarios with runs of their own: how far these are apart, and which of them are not counted, and why."""
    lines = []
    for arm in {arm.repeated.name: arm for arm in arms if arm.repeated.has_runs}.values():
        lines.append(spread_line(arm.repeated, [run.summary for run in arm.runs], arm.means_s, "the means of "))
        lines += left_out_lines(arm.repeated, [run.outcome for run in arm.runs])
    return lines


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a run's work is not that of others: by itself, or `against` another run."""

    run: StepRun
    text: str
    against: StepRun | None = None


def problem_texts(problems: Iterable[Problem], arms: Sequence[Arm]) -> tuple[str, ...]:
    """Each problem once. Where an arm has several runs, after the names of those that have it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for problem in problems:
        against = f" against {problem.against.name}" if problem.against else ""
        found[against, problem.text].append(problem.run.name)
    if all(len(arm.runs) == 1 for arm in arms):
        return tuple(text for _, text in found)
    return tuple(f"{', '.join(names)}{against}: {text}" for (against, text), names in found.items())


def differences(first: dict[str, str], second: dict[str, str], *, chosen: Sequence[str] = ()) -> list[str]:
    """`name: VALUE / VALUE` of all fields that differ, without the `chosen` ones."""
    names = sorted((first.keys() | second.keys()) - set(chosen))
    return [f"{name}: {first.get(name)} / {second.get(name)}" for name in names if first.get(name) != second.get(name)]


def conditions(outcome: Outcome) -> dict[str, str]:
    """The versions and GPUs of a run."""
    environment = outcome.result.environment if outcome.result else None
    if environment is None:
        return {}
    return {**environment.versions, "GPUs": ", ".join(sorted({gpu.name for gpu in environment.gpus}))}


def loss_difference(first: StepResult, second: StepResult) -> tuple[float | None, int]:
    """The largest relative difference of the first LOSS_STEPS losses, and how many were compared. NaN where one of two
    is missing: earlier versions lost those that were not finite."""
    steps = list(zip(first.samples, second.samples, strict=False))[:LOSS_STEPS]
    if not first.losses or not second.losses:
        return None, 0
    return largest(_relative(one.loss, other.loss) for one, other in steps), len(steps)


def _relative(loss: float | None, other: float | None) -> float:
    if loss is None or other is None:
        return math.nan
    return abs(loss - other) / abs(loss) if loss else abs(other)


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of the values that are known, NaN where one is: `max` would drop it."""
    known = (value for value in values if value is not None)
    return max(known, key=lambda value: (math.isnan(value), value), default=None)
