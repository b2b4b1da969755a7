"""The estimate of training's memory beside the peaks that GPUs measured (docs/results/older)."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.predict.dry_run import DryRunOptions, dry_run
from refit.results.collection import read_collection
from refit.results.result import Result
from refit.results.step import StepResult

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/older"
RUNS = [
    result
    for name in ("gpu2_trainers", "gpu2_dispatchers")
    for result in read_collection(RESULTS / f"{name}.jsonl")
    if result.measurements.keys() == {"train-step"}
]


@pytest.mark.parametrize("result", RUNS, ids=lambda result: result.run_id)
def test_the_estimate_is_within_5_percent(result: Result) -> None:
    assert result.scenario is not None
    steps = result.measurements["train-step"]
    assert isinstance(steps, StepResult)
    estimate = dry_run(result.scenario, DryRunOptions()).held_bytes["source"]
    assert max(estimate.values()) == pytest.approx(steps.peak_bytes, rel=0.05)


def test_all_trainers_are_among_them() -> None:
    formats = {result.scenario.source.format for result in RUNS if result.scenario}
    assert formats == {"megatron", "fsdp2", "autotp"}
