"""Pairs runs that differ in the token dispatcher alone, judges whether they did equal work, and tabulates their times.

A difference in time says something about the dispatchers only where both runs did the same work. So a delta is shown
only where the configurations differ in the selector alone, tokens are equal, none is dropped and the losses agree.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refit.config.steps import Dispatch
from refit.report.refits.run_spread import beyond_text, exceeds_spread
from refit.report.steps.arms import (
    RANK_CAPACITY,
    SELECTOR,
    Arm,
    Problem,
    StepRun,
    arms_of,
    cell_of,
    conditions,
    differences,
    largest,
    loss_difference,
    problem_texts,
    run_lines,
)
from refit.report.terminal.escaped import FILE_WIDTH
from refit.report.terminal.grid import Column, fitted
from refit.results.outcomes import Outcome
from refit.results.step import StepResult

LOSS_BAR = 4.1e-4
"""Largest relative difference of equal-work loss curves: what two dispatchers of the literal Kimi K2 in bfloat16 had
on 256 GPUs (awsome-distributed-training, pull request 1116)."""

DROPS = ("moe_expert_capacity_factor", RANK_CAPACITY)
"""Fields that, where set, let experts drop tokens. NCCL EP fails where its RANK_CAPACITY is exceeded."""

FIRST = ("alltoall", "allgather")
"""The arm that others are compared with: the first of these that ran, else the first arm."""


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
    """Two arms of one cell, each with all its runs."""

    first: Arm
    second: Arm
    work: Equivalence

    @property
    def delta(self) -> float | None:
        """The second's mean step over the first's, less 1; None where their work is not equal."""
        return self.second.mean_s / self.first.mean_s - 1 if self.work.is_equal else None

    @property
    def is_beyond_spread(self) -> bool | None:
        """Whether the difference is more than the steps' own spread and that between runs; None with too few steps."""
        return exceeds_spread(self.first.samples_s, self.second.samples_s)


def pairings(outcomes: Sequence[Outcome]) -> list[Pairing]:
    """The pairs of every cell, each arm against the cell's first, by layout, overlap and micro-batch."""
    cells: dict[str, dict[str, Arm]] = defaultdict(dict)
    for arm in arms_of(outcomes):
        cell = cell_of(arm, dispatcher=Dispatch().dispatcher, backend=None, rank_capacity=None)
        cells[cell][arm.name] = arm
    found = []
    for arms in cells.values():
        base = next(arms[name] for name in (*FIRST, *arms) if name in arms)
        found += [Pairing(base, arm, judge(base, arm)) for arm in arms.values() if arm is not base]
    return sorted(found, key=_order)


def _order(pairing: Pairing) -> tuple[str, bool, int, str]:
    steps = pairing.first.steps
    return pairing.first.where, steps.dispatch.overlap, steps.micro_batch_size, pairing.second.name


def judge(first: Arm, second: Arm, chosen: Sequence[str] = SELECTOR, what: str = "the dispatcher") -> Equivalence:
    """Whether all runs of two arms did equal work: each is compared with the first run of the first arm.

    `chosen` are the fields of Megatron's configuration that may differ, which set `what`.
    """
    base, *others = [*first.runs, *second.runs]
    losses = [loss_difference(base.result, run.result) for run in others]
    problems = [
        *(Problem(run, text) for arm in (first, second) for run in arm.runs for text in _own_problems(arm.name, run)),
        *(
            Problem(run, text, base)
            for run, (difference, _) in zip(others, losses, strict=True)
            for text in [*_configured(base, run, chosen, what), *_problems(base, run, difference)]
        ),
    ]
    difference, num_losses = largest(found for found, _ in losses), min(number for _, number in losses)
    return Equivalence(problem_texts(problems, (first, second)), difference, num_losses)


def _own_problems(name: str, run: StepRun) -> Iterator[str]:
    if not run.result.config:
        yield f"{name} has no configuration on record"
    yield from (f"{name} may drop tokens: {field} is set" for field in DROPS if _is_set(run.result, field))


def _configured(base: StepRun, run: StepRun, chosen: Sequence[str], what: str) -> Iterator[str]:
    if others := differences(base.result.config, run.result.config, chosen=chosen):
        yield f"configurations differ in more than {what}: {', '.join(others[:4])}"


def _problems(base: StepRun, run: StepRun, difference: float | None) -> Iterator[str]:
    results = base.result, run.result
    tokens = [[sample.num_tokens for sample in result.samples] for result in results]
    if tokens[0] != tokens[1]:
        yield f"tokens differ: {sum(tokens[0]):,} and {sum(tokens[1]):,} over all steps"
    versions = [conditions(each.outcome) for each in (base, run)]
    if versions[0] != versions[1]:
        yield f"versions or GPUs differ: {', '.join(differences(*versions))}"
    if difference is None:
        yield "there are no losses to compare"
    elif not difference <= LOSS_BAR:
        yield f"losses differ by {difference:.1e}, more than {LOSS_BAR:.1e}"


def _is_set(result: StepResult, name: str) -> bool:
    fails = name == RANK_CAPACITY and result.config.get("moe_flex_dispatcher_backend") == "ncclep"
    return result.config.get(name, "None") != "None" and not fails


def dispatcher_text(outcomes: Sequence[Outcome], width: int = FILE_WIDTH) -> str:
    """The table of every pair of dispatchers, and the verdicts on their work; empty where nothing can be paired."""
    found = pairings(outcomes)
    if not found:
        return ""
    arms = [arm for pairing in found for arm in (pairing.first, pairing.second)]
    blocks = [f"Token dispatchers: mean training step, slowest rank; {_routing(found)}"]
    for names, group in itertools.groupby(sorted(found, key=_names), key=_names):
        blocks.append(_table(names, list(group), width))
    blocks.append("\n".join([*map(_verdict, found), *run_lines(arms)]))
    return "\n\n".join(blocks)


def _names(pairing: Pairing) -> tuple[str, str]:
    return pairing.first.name, pairing.second.name


def _routing(found: Sequence[Pairing]) -> str:
    forced = [pairing.first.steps.dispatch.balanced for pairing in found]
    if all(forced):
        return "routing forced balanced"
    return "routing forced balanced in some cells" if any(forced) else "routing is the router's own"


def _table(names: tuple[str, str], group: Sequence[Pairing], width: int) -> str:
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
    return fitted(columns, [_row(pairing) for pairing in group], width)


def _row(pairing: Pairing) -> list[str]:
    first, second, work = pairing.first, pairing.second, pairing.work
    delta = pairing.delta
    return [
        first.where,
        str(first.steps.micro_batch_size),
        "on" if first.steps.dispatch.overlap else "off",
        *(f"{1e3 * arm.mean_s:.2f}" for arm in (first, second)),
        "-" if delta is None else f"{100 * delta:+.1f}",
        "-" if delta is None else faster_by(pairing, delta),
        "-" if delta is None else beyond_text(pairing.is_beyond_spread),
        f"{first.num_measured}+{second.num_measured}",
        str(first.num_stalls + second.num_stalls),
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
    result = pairing.first.runs[0].result
    return (
        f"{cell}{names}: equal work: {len(result.config)} fields of the configuration are equal but for "
        f"the dispatcher, {sum(sample.num_tokens for sample in result.samples):,} tokens each, no drops, "
        f"losses of {work.num_losses} steps within {work.loss_difference:.1e} (bar {LOSS_BAR:.1e})"
    )
