"""The whole cycle on forked ranks: training steps, the verified refit of trained weights, forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refit.models.megatron.dispatchers import CLASSES
from refit.report.cycle import cycle_lines, cycle_of
from refit.report.dispatchers import pairings
from refit.results.outcomes import Outcome
from refit.results.result import Result, read_result
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
