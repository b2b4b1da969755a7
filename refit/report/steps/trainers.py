"""Ranks runs that train one model with the same layout and batch, each with another library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit.config.layout import Layout
from refit.config.registry import FORMATS
from refit.config.scenario import Scenario
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.report.refits.points import median
from refit.report.refits.run_spread import beyond_text, exceeds_spread
from refit.report.steps.arms import (
    Arm,
    Problem,
    StepRun,
    arms_of,
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
from refit.results.step import COMBINED, STEP_PARTS, StepResult

LOSS_BAR = {Dtype.FP32: 1e-5, Dtype.BF16: 1e-3, Dtype.FP16: 1e-3}
"""Largest relative difference of the losses of equal work. Measured on CPUs with tiny_qwen3 at TP2 DP2, equal initial
weights and tokens: 1.8e-6 in float32 (learning rate 1e-2) and 8.5e-5 in bfloat16."""

PARTS = tuple(part for part in STEP_PARTS if part != COMBINED)
"""Only Megatron-Core computes forward and backward together, and no other library is compared with that."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """One scenario with all its runs. `problems` are the reasons why their work differs from that of the others,
    `loss_difference` is relative to the run that they are compared with."""

    arm: Arm
    problems: tuple[str, ...]
    loss_difference: float | None

    @property
    def title(self) -> str:
        """`fsdp2 TP2 EP1 FSDP2`, `megatron TP2 EP1 TE`; Megatron's sides have no format in their title."""
        source = self.arm.scenario.source
        named = source.title if source.title.startswith(source.format) else f"{source.format} {source.title}"
        return " ".join(filter(None, (named, self.arm.engine)))


def rankings(outcomes: Sequence[Outcome]) -> list[list[Trainer]]:
    """The scenarios of each model, layout and batch that several libraries trained, fastest mean step first."""
    groups: dict[str, list[Arm]] = defaultdict(list)
    for arm in arms_of(outcomes):
        groups[work(arm.scenario)].append(arm)
    several = [arms for arms in groups.values() if len({arm.scenario.source.format for arm in arms}) > 1]
    return [_ranked(arms) for arms in several]


def _ranked(arms: Sequence[Arm]) -> list[Trainer]:
    ranked = sorted(arms, key=lambda arm: arm.mean_s)
    references = {name for name, row in FORMATS.items() if row.is_reference}
    base = next((arm for arm in ranked if arm.scenario.source.format in references), ranked[0])
    attention = next(filter(None, (arm.scenario.source.attn_impl for arm in ranked)), None)
    return [_compared(base, arm, attention) for arm in ranked]


def _compared(base: Arm, arm: Arm, attention: str | None) -> Trainer:
    """Every run of `arm` beside the first run of `base`; `attention` is that of the fastest model of transformers."""
    first = base.runs[0]
    losses = [loss_difference(first.result, run.result)[0] for run in arm.runs]
    problems = [
        Problem(run, text, first)
        for run, difference in zip(arm.runs, losses, strict=True)
        for text in _problems(first, run, difference)
    ]
    texts = problem_texts(problems, (base, arm))
    return Trainer(arm, (*texts, *_other_attention(arm.scenario.source, attention)), largest(losses))


def work(scenario: Scenario) -> str:
    """What the runs of a ranking have in common: the scenario without its source's library and that one's settings.

    Layouts have the sizes that every library has, without those of experts, and where results go does not count.
    """
    layout, alone = scenario.source.layout, scenario.source == scenario.destination
    plain = SideSpec(
        Layout(layout.tp, 1, 1, layout.pp, layout.world_size, layout.first_rank, vpp=layout.vpp),
        dtype=scenario.source.compute_dtype,
    )
    destination = plain if alone else scenario.destination
    return repr(
        replace(
            scenario, source=plain, destination=destination, run_name=None, output_dir=Path(), notes=(), recorded={}
        )
    )


def _problems(base: StepRun, run: StepRun, difference: float | None) -> Iterator[str]:
    tokens = [[sample.num_tokens for sample in each.result.samples] for each in (base, run)]
    if tokens[0] != tokens[1]:
        yield f"tokens differ: {sum(tokens[0]):,} and {sum(tokens[1]):,} over all steps"
    skipped = [each.result.num_skipped for each in (base, run)]
    if skipped[0] != skipped[1]:
        yield f"overflow skipped {skipped[0]} and {skipped[1]} steps"
    dtypes = [_dtype_text(each.scenario.source) for each in (base, run)]
    if dtypes[0] != dtypes[1]:
        yield f"precision differs: {dtypes[0]}, and {dtypes[1]}"
    versions = [conditions(each.outcome) for each in (base, run)]
    if versions[0] != versions[1]:
        yield f"versions or GPUs differ: {', '.join(differences(*versions))}"
    bar = _bar(run.scenario)
    if difference is None:
        yield "there are no losses to compare"
    elif not difference <= bar:
        yield f"losses differ by {difference:.1e}, more than {bar:.1e}"


def _dtype_text(side: SideSpec) -> str:
    name = side.compute_dtype.value if side.compute_dtype is not None else "the provider's dtype"
    return f"float32 under autocast in {name}" if side.autocast is not None else name


def _other_attention(side: SideSpec, attention: str | None) -> Iterator[str]:
    """Megatron-Core's attention is its own. Models of transformers are compared with the same, `attention`."""
    if side.attn_impl is not None and side.attn_impl != attention:
        yield f"attention differs: {attention} and {side.attn_impl}"


def _bar(scenario: Scenario) -> float:
    dtype = scenario.source.compute_dtype
    return LOSS_BAR[dtype] if dtype is not None else 0.0


def trainer_text(outcomes: Sequence[Outcome], width: int = FILE_WIDTH) -> str:
    """The ranking of every model, layout and batch, and under it what each library trained with; empty without any."""
    return "\n\n".join(_block(ranking, width) for ranking in rankings(outcomes))


def _block(ranking: Sequence[Trainer], width: int) -> str:
    scenario, steps, arms = ranking[0].arm.scenario, ranking[0].arm.steps, [trainer.arm for trainer in ranking]
    title = (
        f"Trainers of {scenario.model_title or 'one model'}: {scenario.source.world_size} ranks, "
        f"{steps.global_batch_size} sequences of {steps.seq_length} tokens, micro-batch {steps.micro_batch_size}; "
        "mean training step, slowest rank"
    )
    title += f"; of runs that measure {', '.join(scenario.measurements)}" if len(scenario.measurements) > 1 else ""
    columns, rows = list(COLUMNS), [_row(place, trainer, ranking[0]) for place, trainer in enumerate(ranking, start=1)]
    if any(arm.repeated.has_runs for arm in arms):
        place = columns.index(OVER) + 1
        columns.insert(place, Column("beyond", "spread", is_text=True))
        for row, trainer in zip(rows, ranking, strict=True):
            row.insert(place, _beyond(trainer, ranking[0]))
    return "\n\n".join((title, fitted(columns, rows, width), "\n".join([*map(_verdict, ranking), *run_lines(arms)])))


OVER = Column("over", "first (%)")
COLUMNS = [
    Column("trainer", is_text=True),
    Column("rank"),
    Column("mean", "(ms)"),
    Column("std", "(ms)"),
    OVER,
    Column("tokens", "per s"),
    Column("sequences", "per s"),
    Column("TFLOP/s", "per rank"),
    Column("peak", "(GiB)"),
    *(Column(part, "(%)") for part in PARTS),
    Column("rest", "(%)"),
    Column("stalls"),
    Column("loss", "difference"),
    Column("work", is_text=True),
]


def _row(place: int, trainer: Trainer, first: Trainer) -> list[str]:
    arm = trainer.arm
    return [
        trainer.title,
        str(place),
        f"{1e3 * arm.mean_s:.2f}",
        f"{1e3 * arm.std_s:.2f}",
        over_first(trainer, first),
        f"{arm.tokens_per_s:,.0f}",
        f"{arm.samples_per_s:,.2f}",
        f"{arm.tflops_per_gpu:,.4g}",
        "-" if arm.peak_bytes is None else f"{arm.peak_bytes / 2**30:.2f}",
        *shares(arm),
        str(arm.num_stalls),
        "-" if trainer.loss_difference is None else f"{trainer.loss_difference:.1e}",
        "NOT EQUAL" if trainer.problems else "equal",
    ]


def over_first(trainer: Trainer, first: Trainer) -> str:
    """By how much its mean step is longer than that of the first, in %; `-` where their work is not equal."""
    return f"{100 * (trainer.arm.mean_s / first.arm.mean_s - 1):+.1f}" if _judged(trainer, first) else "-"


def _judged(trainer: Trainer, first: Trainer) -> bool:
    return not trainer.problems and not first.problems


def _beyond(trainer: Trainer, first: Trainer) -> str:
    """Whether it differs from the first by more than steps and runs vary; `-` where that is not judged."""
    if trainer is first or not _judged(trainer, first):
        return "-"
    return beyond_text(exceeds_spread(trainer.arm.samples_s, first.arm.samples_s))


def shares(arm: Arm) -> list[str]:
    """In % of the recorded step: each of PARTS, and the rest; `-` where not known."""
    found = zip(*(_shares_of(run.result) for run in arm.runs), strict=True)
    return ["-" if share is None else f"{100 * share:.1f}" for share in map(median, found)]


def _shares_of(result: StepResult) -> list[float | None]:
    """That of each of PARTS in the recorded step, and of the rest; None where not known."""
    found = result.breakdown
    if found is None:
        return [None] * (len(PARTS) + 1)
    shares = [found.share(part) if part in found.parts_s else None for part in PARTS]
    return [*shares, found.rest_s / found.seconds if found.seconds else 0.0]


def _verdict(trainer: Trainer) -> str:
    """What trained, what of the vocabulary is split, and whether the work is that of the others."""
    result, bar = trainer.arm.runs[0].result, _bar(trainer.arm.scenario)
    if trainer.problems:
        work = f"NOT EQUAL work: {'; '.join(trainer.problems)}"
    else:
        work = f"equal work, losses within {trainer.loss_difference:.1e} (bar {bar:.1e})"
    return f"{trainer.title}: {result.optimizer}; vocabulary {result.vocabulary or 'not on record'}; {work}"
