"""Trainers as documents show them: the ranking of each layout, and the parts of every trainer's step."""

from __future__ import annotations

from collections.abc import Sequence

from docs.tables.refits import conditions, wrapped
from refit.report.steps.arms import Arm
from refit.report.steps.trainers import PARTS, Trainer, over_first, rankings, shares
from refit.report.terminal.escaped import markdown_text
from refit.report.terminal.grid import markdown
from refit.results.outcomes import Outcome


def section(outcomes: Sequence[Outcome]) -> str:
    """What was measured and on what, the rankings, and the parts of every trainer's step."""
    found = rankings(outcomes)
    return "\n\n".join([conditions(outcomes), *([_ranked(found), _legend(found), _steps(found)] if found else [])])


def _ranked(found: Sequence[Sequence[Trainer]]) -> str:
    header = ["layout", "trainer", "mean ms", "over first %", "tokens/s", "TFLOP/s per GPU", "peak GiB"]
    header += ["loss difference", "work"]
    return markdown(header, [_row(trainer, ranking[0]) for ranking in found for trainer in ranking], 2)


def _row(trainer: Trainer, first: Trainer) -> list[str]:
    arm, difference = trainer.arm, trainer.loss_difference
    return [
        layout(arm) if trainer is first else "",
        markdown_text(trainer.title),
        f"{1e3 * arm.mean_s:.1f}",
        over_first(trainer, first),
        "" if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}",
        "" if arm.tflops_per_gpu is None else f"{arm.tflops_per_gpu:.4g}",
        "" if arm.peak_bytes is None else f"{arm.peak_bytes / 2**30:.1f}",
        "" if difference is None else f"{difference:.1e}",
        markdown_text(f"NOT EQUAL: {'; '.join(trainer.problems)}") if trainer.problems else "equal",
    ]


def layout(arm: Arm) -> str:
    """`TP2 DP1`: what the trainers of a ranking have in common; PP where it is not 1."""
    found = arm.scenario.source.layout
    stages = f" PP{found.pp}" if found.pp > 1 else ""
    return f"TP{found.tp}{stages} DP{found.dp}"


def _legend(found: Sequence[Sequence[Trainer]]) -> str:
    """What the figures are of, for all rankings."""
    steps = [ranking[0].arm.steps for ranking in found]
    batches = sorted(
        {
            f"{each.global_batch_size} sequences of {each.seq_length:,} tokens, {each.micro_batch_size} at a time"
            for each in steps
        }
    )
    return wrapped(
        f"Mean training step of the slowest rank, {' and '.join(batches)}; losses beside those of "
        "Megatron-Core, or of the fastest without it. Below: where the time of one recorded step goes, in % of it; a "
        "library without a gradient sync of its own has it in backward."
    )


def _steps(found: Sequence[Sequence[Trainer]]) -> str:
    trainers = [(ranking[0], trainer) for ranking in found for trainer in ranking]
    rows = [
        [layout(each.arm) if each is first else "", markdown_text(each.title), *shares(each.arm)]
        for first, each in trainers
    ]
    return markdown(["layout", "trainer", *PARTS, "rest"], rows, 2)
