"""The whole cycle on forked ranks: training steps, the verified refit of trained weights, forward passes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from refit.bench.initial_weights import initialise
from refit.bench.measurements import train_step
from refit.bench.measurements.step_run import numbers_of
from refit.bench.measurements.train_step import tokens_of
from refit.config.steps import StepSettings
from refit.errors import ExitCode
from refit.models.megatron.dispatchers import CLASSES
from refit.models.sharded_model import StepReport
from refit.report.refits.headline import headlines
from refit.report.steps.cycle import cycle_lines, cycle_of
from refit.report.steps.dispatchers import pairings
from refit.report.steps.step_lines import train_closing_lines
from refit.results.outcomes import Outcome
from refit.results.refit import ForwardCheck
from refit.results.result import Result, read_result
from refit.results.runs import outcome_of
from refit.results.status import Status
from refit.results.step import ForwardResult, StepResult
from refit.sweep.selection import select_file
from tests.bench.test_runner import TINY, run_scenario
from tests.ranks.pool import RankPool
from tests.report.factories import planned

STEPS = ["--seq-length", "16", "--global-batch-size", "8", "--num-train-steps", "2", "--num-train-warmup", "1"]
CYCLE = [*TINY, *STEPS, "--refit-method", "gloo", "--measure", "forward,refit,train-step"]
LAYOUTS = ["--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--source-world-size", "4"]
LAYOUTS += ["--rl-inference-tensor-model-parallel-size", "2", "--rl-inference-pipeline-model-parallel-size", "1"]


def test_the_cycle_is_measured_and_checked(ranks: RankPool, tmp_path: Path) -> None:
    flags = [*CYCLE, *LAYOUTS, "--moe-token-dispatcher-type", "alltoall"]
    result: Result = ranks.run(run_scenario, flags, str(tmp_path))[0]
    assert result.status is Status.OK
    assert list(result.measurements) == ["train-step", "refit", "forward"]
    train, forward = result.measurements["train-step"], result.measurements["forward"]
    assert isinstance(train, StepResult)
    assert train.dispatcher == "MoEAlltoAllTokenDispatcher"
    assert train.config["moe_token_dispatcher_type"] == "alltoall"
    assert [sample.warmup for sample in train.samples] == [True, False, False]
    assert all(len(sample.seconds_per_rank) == 8 for sample in train.samples)
    assert train.samples[0].num_tokens == 8 * 16
    assert train.losses[0] == pytest.approx(6.9, abs=0.3)  # about log(1000)
    assert train.num_microbatches == 4
    breakdown = train.breakdown
    assert breakdown is not None
    assert sum(breakdown.parts_s.values()) + breakdown.rest_s == pytest.approx(breakdown.seconds)
    assert {"dispatch forward", "combine backward"} <= breakdown.experts_s.keys()
    assert train.peak_bytes is None or train.peak_bytes > 0
    assert isinstance(forward, ForwardResult)
    assert forward.weights == "trained"
    assert forward.prefill is not None
    assert forward.prefill.tokens_per_s is not None
    assert forward.token is not None
    tested = result.refit.tested if result.refit else None
    assert tested is not None
    assert tested.num_wrong == 0 < tested.num_compared
    assert tested.trained is not None
    assert tested.trained.passed
    assert tested.trained.agreement == 1.0
    assert read_result(tmp_path / "run.json") == result
    cycle = cycle_of(result)
    assert cycle is not None
    assert 0 < cycle.refit_share < 1
    assert "The refit is" in cycle_lines(result)[1]


def test_weights_lost_on_the_way_fail_the_check_of_logits(ranks: RankPool) -> None:
    result: Result = ranks.run(run_without_restoring, [*CYCLE, *LAYOUTS])[0]
    assert result.refit is not None
    assert result.refit.tested is not None
    assert result.refit.tested.num_wrong == 0
    assert result.refit.tested.trained is not None
    assert not result.refit.tested.trained.passed
    assert result.status is Status.WRONG_DATA


def run_without_restoring(rank: int, flags: list[str]) -> Result:
    """The source changes after the refit of the trained weights, as if the destination had not got them."""
    from refit.bench.measurements import engine_run

    def compare(session: object, source: object, destination: object) -> object:
        for shard in getattr(source, "weights", None) or ():
            if shard.tensor.key == "output_layer.weight":
                shard.view.copy_(torch.flip(shard.view, (0,)))
        return unchanged(session, source, destination)  # type: ignore[arg-type]

    unchanged = engine_run.compare_forward
    engine_run.compare_forward = compare  # type: ignore[assignment]
    try:
        found: Result = run_scenario(rank, flags)
    finally:
        engine_run.compare_forward = unchanged
    return found


def test_a_loss_that_is_nan_is_wrong_data(ranks: RankPool, tmp_path: Path) -> None:
    """The refit behind it is checked bit for bit as always, and moves the weights; their logits are not compared."""
    flags = [*CYCLE, *LAYOUTS, "--moe-token-dispatcher-type=alltoall", "--num-train-steps=3"]
    result: Result = ranks.run(run_with_nan, flags, str(tmp_path))[0]
    assert (result.status, result.exit_code) == (Status.WRONG_DATA, ExitCode.WRONG_DATA)
    train, refit, forward = result.measurements.values()
    reason = "loss of train step 2/3 is nan (3 of 5 steps are not finite): no time of this run counts"
    assert (train.status, train.reason) == (Status.WRONG_DATA, reason)
    assert [sample.not_finite.get("loss") for sample in train.samples] == [None, None, "nan", "nan"]
    assert [sample.loss is None for sample in train.samples] == [False, False, True, True]
    assert train.summary.median_s > 0
    assert (refit.status, refit.tested.num_wrong) == (Status.OK, 0)
    assert refit.tested.num_compared > 0
    assert refit.tested.trained == ForwardCheck(passed=True, skipped=reason)
    assert forward.status is Status.OK
    assert cycle_lines(result) == [f"No cycle: {reason}"]
    alone = replace(result, measurements={"train-step": train})
    assert cycle_lines(alone) == []
    assert train_closing_lines(train, result)[-1] == f"FAILED (train step): {reason}"
    assert read_result(tmp_path / "run.json") == result
    (line,) = headlines(outcome_of("run", result))
    assert f": WRONG DATA: {reason}; " in line


def run_with_nan(rank: int, flags: list[str], directory: str) -> Result:
    """Before the third step a tensor of rank 0 becomes NaN."""
    held: list[Any] = []

    def initial(weights: Any, *others: Any) -> None:
        held.append(weights)
        initialise(weights, *others)

    def tokens(steps: StepSettings, number: int, vocab_size: int) -> torch.Tensor:
        if number == 2 and rank == 0:
            next(iter(held[0])).view.fill_(math.nan)
        return tokens_of(steps, number, vocab_size)

    with patch.object(train_step, "initialise", initial), patch.object(train_step, "tokens_of", tokens):
        found: Result = run_scenario(rank, flags, directory)
        return found


def test_a_number_of_one_rank_that_is_not_finite_is_that_of_the_step() -> None:
    """`max` would drop NaN behind a number."""
    for place in range(3):
        reports = [StepReport(5.0, 1.0)] * 3
        reports[place] = StepReport(math.inf, math.nan)
        found = numbers_of(reports)
        assert (found.finite("loss"), found.finite("grad_norm")) == (None, None)
        assert found.not_finite == {"loss": "inf", "grad_norm": "nan"}
    found = numbers_of([StepReport(5.0, 1.0), StepReport(), StepReport(6.0, 2.0)])
    assert (found.finite("loss"), found.finite("grad_norm"), found.not_finite) == (5.5, 2.0, {})
    skipped = numbers_of([StepReport(5.0, skipped=True)])
    assert (skipped.finite("grad_norm"), skipped.skipped, skipped.not_finite) == (None, True, {})


def test_a_training_step_alone_builds_the_source_alone(ranks: RankPool) -> None:
    flags = [*TINY, *STEPS, "--refit-method", "gloo", "--measure", "train-step", "--expert-model-parallel-size", "2"]
    result: Result = ranks.run(run_scenario, flags)[0]
    assert result.status is Status.OK
    assert result.refit is None
    assert result.measurements["train-step"].dispatcher == "MoEAllGatherTokenDispatcher"
    assert result.scenario is not None
    assert result.scenario.num_ranks == 2


def test_the_tiny_list_of_dispatchers_does_equal_work(ranks: RankPool) -> None:
    """The first cell of dispatcher_tiny, with fewer steps: both arms ran as asked for, and their work is equal."""
    candidates = [each for each in select_file("dispatcher_tiny", []).candidates if each.name.startswith("EP2_1_")]
    assert len(candidates) == 2
    outcomes = []
    for candidate in candidates:
        flags = [*candidate.flags, *BALANCED, "--num-train-steps=2", "--num-train-warmup=1", "--num-layers=2"]
        result: Result = ranks.run(run_scenario, [*flags, "--moe-layer-freq=([0]*1+[1]*1)", "--vocab-size=500"])[0]
        outcomes.append(Outcome(planned(candidate.name), result.status, None, result))
    (pair,) = pairings(outcomes)
    assert pair.work.problems == ()
    assert pair.work.loss_difference is not None
    assert pair.work.loss_difference < 1e-4
    assert {arm.runs[0].result.dispatcher for arm in (pair.first, pair.second)} == {CLASSES[name] for name in ARMS}


ARMS = ("alltoall", "allgather")
BALANCED = ["--moe-router-force-load-balancing"]
