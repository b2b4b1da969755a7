"""Ranks runs that train one model with the same layout and batch, each with another library."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit.config.layout import Layout
from refit.config.scenario import Scenario
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.report.dispatchers import Arm, arm_of, conditions, differences, loss_difference
from refit.report.grid import Column, fitted
from refit.results.outcomes import Outcome
from refit.results.step import StepResult

LOSS_BAR = {Dtype.FP32: 1e-5, Dtype.BF16: 1e-3, Dtype.FP16: 1e-3}
"""Largest relative difference of the losses of equal work. Measured on CPUs with tiny_qwen3 at TP2 DP2, equal initial
weights and tokens: 1.8e-6 in float32 (learning rate 1e-2) and 8.5e-5 in bfloat16."""

PARTS = ("forward", "backward", "gradient sync", "optimizer")

FIRST = "megatron"
"""The trainer whose losses others are compared with, where it ran; else the fastest."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """One run. `problems` are the reasons why its work differs from that of the others, `loss_difference` is relative
    to the run that they are compared with."""

    arm: Arm
    problems: tuple[str, ...]
    loss_difference: float | None

    @property
    def title(self) -> str:
        """`fsdp2 TP2 EP1 FSDP2`; Megatron's sides have no format in their title."""
        source = _scenario(self.arm).source
        return source.title if source.title.startswith(source.format) else f"{source.format} {source.title}"

    @property
    def mean_s(self) -> float:
        summary = self.arm.result.summary
        assert summary is not None, "an arm has measured steps"
        return summary.mean_s


def rankings(outcomes: Sequence[Outcome]) -> list[list[Trainer]]:
    """The runs of each model, layout and batch that several libraries trained, fastest mean step first."""
    groups: dict[str, list[Arm]] = defaultdict(list)
    for arm in filter(None, map(arm_of, outcomes)):
        groups[_work(_scenario(arm))].append(arm)
    several = [arms for arms in groups.values() if len({_scenario(arm).source.format for arm in arms}) > 1]
    return [_ranked(arms) for arms in several]


def _ranked(arms: Sequence[Arm]) -> list[Trainer]:
    ranked = sorted(arms, key=lambda arm: arm.result.summary.mean_s if arm.result.summary else 0.0)
    base = next((arm for arm in ranked if _scenario(arm).source.format == FIRST), ranked[0])
    found = []
    for arm in ranked:
        difference, _ = loss_difference(base.result, arm.result)
        found.append(Trainer(arm, tuple(_problems(base, arm, difference)), difference))
    return found


def _scenario(arm: Arm) -> Scenario:
    assert arm.outcome.result is not None
    assert arm.outcome.result.scenario is not None
    return arm.outcome.result.scenario


def _work(scenario: Scenario) -> str:
    """What the runs of a ranking have in common: the scenario without its source's library and that one's settings.

    Layouts have the sizes that every library has, without those of experts, and where results go does not count.
    """
    layout, alone = scenario.source.layout, scenario.source == scenario.destination
    plain = SideSpec(
        Layout(layout.tp, 1, 1, layout.pp, layout.world_size, layout.first_rank, vpp=layout.vpp),
        dtype=scenario.source.dtype,
    )
    destination = plain if alone else scenario.destination
    return repr(
        replace(
            scenario, source=plain, destination=destination, run_name=None, output_dir=Path(), notes=(), recorded={}
        )
    )


def _problems(base: Arm, arm: Arm, difference: float | None) -> Iterator[str]:
    tokens = [[sample.num_tokens for sample in each.result.samples] for each in (base, arm)]
    if tokens[0] != tokens[1]:
        yield f"tokens differ: {sum(tokens[0]):,} and {sum(tokens[1]):,} over all steps"
    skipped = [each.result.num_skipped for each in (base, arm)]
    if skipped[0] != skipped[1]:
        yield f"overflow skipped {skipped[0]} and {skipped[1]} steps"
    versions = [conditions(each.outcome) for each in (base, arm)]
    if versions[0] != versions[1]:
        yield f"versions or GPUs differ: {', '.join(differences(*versions))}"
    bar = _bar(arm)
    if difference is None:
        yield "there are no losses to compare"
    elif not difference <= bar:
        yield f"losses differ by {difference:.1e}, more than {bar:.1e}"


def _bar(arm: Arm) -> float:
    dtype = _scenario(arm).source.dtype
    return LOSS_BAR[dtype] if dtype is not None else 0.0


def trainer_text(outcomes: Sequence[Outcome]) -> str:
    """The ranking of every model, layout and batch, and under it what each library trained with; empty without any."""
    return "\n\n".join(_block(ranking) for ranking in rankings(outcomes))


def _block(ranking: Sequence[Trainer]) -> str:
    scenario, steps = _scenario(ranking[0].arm), ranking[0].arm.steps
    title = (
        f"Trainers of {scenario.model_title or 'one model'}: {scenario.source.world_size} ranks, "
        f"{steps.global_batch_size} sequences of {steps.seq_length} tokens, micro-batch {steps.micro_batch_size}; "
        "mean training step, slowest rank"
    )
    title += f"; of runs that measure {', '.join(scenario.measurements)}" if len(scenario.measurements) > 1 else ""
    rows = [_row(place, trainer, ranking[0]) for place, trainer in enumerate(ranking, start=1)]
    return "\n\n".join((title, fitted(COLUMNS, rows), "\n".join(_verdict(trainer) for trainer in ranking)))


COLUMNS = [
    Column("trainer", is_text=True),
    Column("rank"),
    Column("mean", "(ms)"),
    Column("std", "(ms)"),
    Column("over", "first (%)"),
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
    result = trainer.arm.result
    assert result.summary is not None
    judged = not trainer.problems and not first.problems
    return [
        trainer.title,
        str(place),
        f"{1e3 * trainer.mean_s:.2f}",
        f"{1e3 * trainer.mean_s * result.summary.cv:.2f}",
        f"{100 * (trainer.mean_s / first.mean_s - 1):+.1f}" if judged else "-",
        f"{result.tokens_per_s:,.0f}",
        f"{result.samples_per_s:,.2f}",
        f"{result.tflops_per_gpu:,.4g}",
        "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f}",
        *_shares(result),
        str(result.num_stalls),
        "-" if trainer.loss_difference is None else f"{trainer.loss_difference:.1e}",
        "NOT EQUAL" if trainer.problems else "equal",
    ]


def _shares(result: StepResult) -> list[str]:
    found = result.breakdown
    if found is None:
        return ["-"] * (len(PARTS) + 1)
    rest = found.rest_s / found.seconds if found.seconds else 0.0
    shares = [found.share(part) if part in found.parts_s else None for part in PARTS]
    return ["-" if share is None else f"{100 * share:.1f}" for share in (*shares, rest)]


def _verdict(trainer: Trainer) -> str:
    """What trained, what of the vocabulary is split, and whether the work is that of the others."""
    result = trainer.arm.result
    if trainer.problems:
        work = f"NOT EQUAL work: {'; '.join(trainer.problems)}"
    else:
        work = f"equal work, losses within {trainer.loss_difference:.1e} (bar {_bar(trainer.arm):.1e})"
    return f"{trainer.title}: {result.optimizer}; vocabulary {result.vocabulary or 'not on record'}; {work}"
