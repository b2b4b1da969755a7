"""Training steps as CSV: `index.csv` with one row per run, and `loss_curve.csv` with one row per step of a run.

`steps.json` has a run in the format of `step_document`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refit.report.steps.step_document import document_text
from refit.report.steps.step_lines import NUMBERS
from refit.report.terminal.grid import comma_separated
from refit.results.outcomes import Outcome
from refit.results.result import replace_text
from refit.results.step import STEPS_SUFFIX, StepResult, StepSample


def write_step_tables(outcomes: Sequence[Outcome], directory: Path, run_id: str) -> list[Path]:
    """Write `<RUN_ID>_index.csv`, and `<RUN_ID>_<NAME>_loss_curve.csv` and `_steps.json` of every run with steps.

    Returns their paths.
    Nothing is written where no scenario measures a training step.
    """
    if not any(outcome.train_step for outcome in outcomes):
        return []
    directory.mkdir(parents=True, exist_ok=True)
    texts = {directory / f"{run_id}_index.csv": index_text(outcomes)}
    for outcome in outcomes:
        if (found := outcome.train_step) is not None and found.samples:
            stem = f"{run_id}_{outcome.planned.name}"
            texts[directory / f"{stem}_loss_curve.csv"] = curve_text(found)
            scenario = outcome.result.scenario if outcome.result else None
            if found.measured and scenario is not None:
                texts[directory / f"{stem}{STEPS_SUFFIX}"] = document_text(scenario, found)
    for path, text in texts.items():
        replace_text(path, text)
    return list(texts)


def index_text(outcomes: Sequence[Outcome]) -> str:
    """One row per run, figures unrounded. Missing values are blank."""
    rows = [_index_row(outcome) for outcome in outcomes]
    return comma_separated(tuple(rows[0]), [tuple(row.values()) for row in rows]) if rows else ""


def curve_text(result: StepResult) -> str:
    """One row per step, warm-up included."""
    header = ("step", "warmup", *NUMBERS, "seconds", "num_tokens")
    rows = [
        (each.step, each.warmup, *(_number(each, name) for name in NUMBERS), each.seconds, each.num_tokens)
        for each in result.samples
    ]
    return comma_separated(header, rows)


def _number(sample: StepSample, name: str) -> float | str | None:
    """A loss or gradient norm as CSV has it, also one that is not finite: `nan`."""
    value: float | None = getattr(sample, name)
    return sample.not_finite.get(name, value)


def _index_row(outcome: Outcome) -> dict[str, object]:
    result = outcome.train_step or StepResult()
    scenario = outcome.result.scenario if outcome.result else None
    steps = scenario.steps if scenario else None
    summary = result.summary
    return {
        "name": outcome.planned.name,
        "model": scenario.model_name if scenario else None,
        "trainer": scenario.source.format if scenario else None,
        "arm": steps.dispatch.arm if steps and result.dispatcher else None,
        "micro_batch_size": steps.micro_batch_size if steps else None,
        "overlap": steps.dispatch.overlap if steps else None,
        "status": outcome.status.value,
        "reason": outcome.reason,
        "dispatcher": result.dispatcher,
        "num_ranks": result.num_ranks or None,
        "num_steps": len(result.measured),
        "num_warmup": len(result.samples) - len(result.measured),
        "mean_s": summary.mean_s if summary else None,
        "median_s": summary.median_s if summary else None,
        "tflops_per_gpu": result.tflops_per_gpu,
        "tokens_per_s": result.tokens_per_s,
        "stalls": result.num_stalls if result.measured else None,
        "peak_bytes": result.peak_bytes,
        "last_loss": _number(result.samples[-1], "loss") if result.samples else None,
    }
