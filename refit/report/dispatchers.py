"""Pairs runs that differ in the token dispatcher alone, judges whether they did equal work, and tabulates their times.

A difference in time says something about the dispatchers only where both runs did the same work. So a delta is shown
only where the configurations differ in the selector alone, tokens are equal, none is dropped and the losses agree.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit.config.scenario import Scenario
from refit.config.steps import Dispatch, StepSettings
from refit.report.compare import exceeds_spread
from refit.report.grid import Column, fitted
from refit.results.outcomes import Outcome
from refit.results.status import Status
from refit.results.step import StepResult

LOSS_BAR = 4.1e-4
"""Largest relative difference of equal-work loss curves: what two dispatchers of the literal Kimi K2 in bfloat16 had
on 256 GPUs (awsome-distributed-training, pull request 1116)."""

LOSS_STEPS = 10
"""Steps of the curves that are compared."""

SELECTOR = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "moe_enable_deepep")
"""Fields of Megatron's configuration that choose the dispatcher."""

DROPS = ("moe_expert_capacity_factor", "moe_expert_rank_capacity_factor")
"""Fields that, where set, let experts drop tokens."""

FIRST = ("alltoall", "allgather")
"""The arm that others are compared with: the first of these that ran, else the first arm."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of a cell. `name` is its dispatcher: `alltoall`, `flex/deepep`, also where the model has no experts."""

    name: str
    outcome: Outcome
    steps: StepSettings
    result: StepResult

    @property
    def where(self) -> str:
        """`kimi_k2 TP2 EP4`: model and layout, and Transformer Engine's layers where they are used."""
        scenario = self.outcome.result.scenario if self.outcome.result else None
        if scenario is None:
            return "unknown layout"
        engine = scenario.source.transformer_impl == "transformer_engine"
        return " ".join(filter(None, (scenario.model_title, scenario.source.title, "TE" if engine else None)))


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Whether two arms did equal work. `problems` are the reasons why not; `loss_difference` is relative, None where no
    step has two losses. `num_losses` steps were compared."""

    problems: tuple[str, ...]
    loss_difference: float | None
    num_losses: int

    @property
    def is_equal(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two arms of one cell."""

    first: Arm
    second: Arm
    work: Equivalence

    @property
    def delta(self) -> float | None:
        """The second's mean step over the first's, less 1; None where their work is not equal."""
        means = self.first.result.summary, self.second.result.summary
        if not self.work.is_equal or means[0] is None or means[1] is None:
            return None
        return means[1].mean_s / means[0].mean_s - 1

    @property
    def is_beyond_spread(self) -> bool | None:
        """Whether the difference is more than the steps' own spread; None with too few steps."""
        old, new = ([sample.seconds for sample in arm.result.measured] for arm in (self.first, self.second))
        return exceeds_spread(old, new)


def arm_of(outcome: Outcome) -> Arm | None:
    """The training steps of a scenario that ended well; None where it measured none."""
    result, scenario = outcome.result, outcome.result.scenario if outcome.result else None
    if result is None or scenario is None or scenario.steps is None or outcome.status is not Status.OK:
        return None
    found = outcome.train_step
    if found is None or found.summary is None:
        return None
    return Arm(scenario.steps.dispatch.arm, outcome, scenario.steps, found)


def pairings(outcomes: Sequence[Outcome]) -> list[Pairing]:
    """The pairs of every cell, each arm against the cell's first, by layout, overlap and micro-batch."""
    cells: dict[str, dict[str, Arm]] = defaultdict(dict)
    for arm in filter(None, map(arm_of, outcomes)):
        assert arm.outcome.result is not None
        assert arm.outcome.result.scenario is not None
        cells[_cell(arm.outcome.result.scenario)][arm.name] = arm
    found = []
    for arms in cells.values():
        base = next(arms[name] for name in (*FIRST, *arms) if name in arms)
        found += [Pairing(base, arm, judge(base, arm)) for arm in arms.values() if arm is not base]
    return sorted(found, key=_order)


def _order(pairing: Pairing) -> tuple[str, bool, int]:
    steps = pairing.first.steps
    return pairing.first.where, steps.dispatch.overlap, steps.micro_batch_size


def _cell(scenario: Scenario) -> str:
    """What the arms of a cell have in common: the scenario without its dispatcher, and without where results go."""
    steps = scenario.steps
    assert steps is not None
    dispatch = replace(steps.dispatch, dispatcher=Dispatch().dispatcher, backend=None)
    neutral = replace(steps, dispatch=dispatch)
    return repr(replace(scenario, steps=neutral, run_name=None, output_dir=Path(), notes=()))


def judge(first: Arm, second: Arm) -> Equivalence:
    """Whether two arms did equal work."""
    difference, number = loss_difference(first.result, second.result)
    return Equivalence(tuple(_problems(first, second, difference)), difference, number)


def _problems(first: Arm, second: Arm, difference: float | None) -> Iterator[str]:
    results = first.result, second.result
    for arm in (first, second):
        if not arm.result.config:
            yield f"{arm.name} has no configuration on record"
        yield from (f"{arm.name} may drop tokens: {name} is set" for name in DROPS if _is_set(arm.result, name))
    others = differences(results[0].config, results[1].config)
    if others:
        yield f"configurations differ in more than the dispatcher: {', '.join(others[:4])}"
    tokens = [[sample.num_tokens for sample in result.samples] for result in results]
    if tokens[0] != tokens[1]:
        yield f"tokens differ: {sum(tokens[0]):,} and {sum(tokens[1]):,} over all steps"
    versions = [conditions(arm.outcome) for arm in (first, second)]
    if versions[0] != versions[1]:
        yield f"versions or GPUs differ: {', '.join(differences(*versions))}"
    if difference is None:
        yield "there are no losses to compare"
    elif difference > LOSS_BAR:
        yield f"losses differ by {difference:.1e}, more than {LOSS_BAR:.1e}"


def _is_set(result: StepResult, name: str) -> bool:
    return result.config.get(name, "None") != "None"


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """`name: VALUE / VALUE` of all fields that differ, without those that choose the dispatcher."""
    names = sorted((first.keys() | second.keys()) - set(SELECTOR))
    return [f"{name}: {first.get(name)} / {second.get(name)}" for name in names if first.get(name) != second.get(name)]


def conditions(outcome: Outcome) -> dict[str, str]:
    """The versions and GPUs of a run."""
    environment = outcome.result.environment if outcome.result else None
    if environment is None:
        return {}
    return {**environment.versions, "GPUs": ", ".join(sorted({gpu.name for gpu in environment.gpus}))}


def loss_difference(first: StepResult, second: StepResult) -> tuple[float | None, int]:
    """The largest relative difference of the first LOSS_STEPS losses, and how many were compared."""
    pairs = list(zip(first.losses, second.losses, strict=False))[:LOSS_STEPS]
    relative = [abs(a - b) / abs(a) if a else abs(b) for a, b in pairs]
    return max(relative, default=None), len(pairs)


def dispatcher_text(outcomes: Sequence[Outcome]) -> str:
    """The table of every pair of dispatchers, and the verdicts on their work; empty where nothing can be paired."""
    found = pairings(outcomes)
    if not found:
        return ""
    blocks = [f"Token dispatchers: mean training step, slowest rank; {_routing(found)}"]
    for names, group in itertools.groupby(sorted(found, key=_names), key=_names):
        blocks.append(_table(names, list(group)))
    blocks.append("\n".join(_verdict(pairing) for pairing in found))
    return "\n\n".join(blocks)


def _names(pairing: Pairing) -> tuple[str, str]:
    return pairing.first.name, pairing.second.name


def _routing(found: Sequence[Pairing]) -> str:
    forced = [pairing.first.steps.dispatch.balanced for pairing in found]
    if all(forced):
        return "routing forced balanced"
    return "routing forced balanced in some cells" if any(forced) else "routing is the router's own"


def _table(names: tuple[str, str], group: Sequence[Pairing]) -> str:
    columns = [
        Column("layout", is_text=True),
        Column("micro-", "batch"),
        Column("overlap", is_text=True),
        Column(names[0], "(ms)"),
        Column(names[1], "(ms)"),
        Column("delta", "(%)"),
        Column("faster by", is_text=True),
        Column("beyond", "spread", is_text=True),
        Column("steps"),
        Column("stalls"),
        Column("loss", "difference"),
        Column("work", is_text=True),
    ]
    return fitted(columns, [_row(pairing) for pairing in group])


def _row(pairing: Pairing) -> list[str]:
    first, second, work = pairing.first, pairing.second, pairing.work
    means = [arm.result.summary.mean_s if arm.result.summary else 0.0 for arm in (first, second)]
    beyond = {True: "yes", False: "no", None: "-"}[pairing.is_beyond_spread]
    delta = pairing.delta
    return [
        first.where,
        str(first.steps.micro_batch_size),
        "on" if first.steps.dispatch.overlap else "off",
        *(f"{1e3 * mean:.2f}" for mean in means),
        "-" if delta is None else f"{100 * delta:+.1f}",
        "-" if delta is None else faster_by(pairing, delta),
        beyond if delta is not None else "-",
        f"{len(first.result.measured)}+{len(second.result.measured)}",
        str(first.result.num_stalls + second.result.num_stalls),
        "-" if work.loss_difference is None else f"{work.loss_difference:.1e}",
        "equal" if work.is_equal else "NOT EQUAL",
    ]


def faster_by(pairing: Pairing, delta: float) -> str:
    """`flex/deepep 35.1 %`: the faster arm, and by how much its mean step is shorter than the other's."""
    if delta == 0:
        return "equal"
    arm, share = (pairing.second, -delta) if delta < 0 else (pairing.first, delta / (1 + delta))
    return f"{arm.name} {100 * share:.1f} %"


def _verdict(pairing: Pairing) -> str:
    """One line on whether two arms did equal work, and how that was found."""
    work, steps = pairing.work, pairing.first.steps
    overlap = "on" if steps.dispatch.overlap else "off"
    cell = f"{pairing.first.where}, micro-batch {steps.micro_batch_size}, overlap {overlap}, "
    names = f"{pairing.first.name} and {pairing.second.name}"
    if work.problems:
        return f"{cell}{names}: NOT EQUAL work: {'; '.join(work.problems)}"
    return (
        f"{cell}{names}: equal work: {len(pairing.first.result.config)} fields of the configuration are equal but for "
        f"the dispatcher, {sum(sample.num_tokens for sample in pairing.first.result.samples):,} tokens each, no drops, "
        f"losses of {work.num_losses} steps within {work.loss_difference:.1e} (bar {LOSS_BAR:.1e})"
    )
