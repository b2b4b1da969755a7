"""Training steps by FSDP2 and AutoTP are those of Megatron-Core: losses, gradients' norms, and the weights refitted."""

from __future__ import annotations

from typing import Any

import pytest

from refit.report.trainers import rankings, trainer_text
from refit.results.outcomes import Outcome
from refit.results.result import Result
from refit.results.status import Status
from refit.results.step import StepResult
from tests.bench.test_runner import run_scenario
from tests.ranks.pool import RankPool
from tests.report.factories import planned

SMALL = ["--model=tiny_qwen3", "--num-layers=2", "--hidden-size=64", "--ffn-hidden-size=96", "--refit-method=gloo"]
STEPS = [
    "--seq-length=16",
    "--global-batch-size=8",
    "--micro-batch-size=2",
    "--num-train-steps=2",
    "--lr=1e-2",
    "--clip-grad=0.5",
]
RANKS = ["--source-world-size=4", "--tensor-model-parallel-size=2"]
TRAIN = [*SMALL, *STEPS, *RANKS, "--measure=train-step", "--num-train-warmup=1"]

FSDP2 = ["--source-format=fsdp2"]
AUTOTP = ["--source-format=autotp"]
UNTIED = "--untie-embeddings-and-output-weights"


def trained(ranks: RankPool, *flags: str) -> Result:
    found: Result = ranks.run(run_scenario, [*TRAIN, *flags])[0]
    assert found.status is Status.OK
    return found


def steps_of(result: Result) -> StepResult:
    found: Any = result.measurements["train-step"]
    assert isinstance(found, StepResult)
    return found


def assert_equal_training(one: Result, other: Result, tolerance: float, norms: float) -> None:
    first, second = steps_of(one), steps_of(other)
    assert second.losses == pytest.approx(first.losses, rel=tolerance)
    assert [each.grad_norm for each in second.samples] == pytest.approx(
        [each.grad_norm for each in first.samples], rel=norms
    )


@pytest.mark.parametrize("untied", [[], pytest.param([UNTIED], marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_three_libraries_take_the_same_steps(ranks: RankPool, untied: list[str]) -> None:
    """In float32, on TP2 DP2 with two micro-batches: gradients are averaged, summed over TP where a rank has a part,
    and clipped (the norms are above 0.5) as Megatron-Core does it."""
    flags = ["--fp32", *untied]
    runs = [trained(ranks, *flags, *library) for library in ([], FSDP2, [*AUTOTP, "--zero-stage=2"])]
    norms = [each.grad_norm for each in steps_of(runs[0]).samples]
    assert all(norm is not None and norm > 0.5 for norm in norms)
    for run in runs[1:]:
        assert_equal_training(runs[0], run, tolerance=1e-5, norms=1e-3)
    outcomes = [Outcome(planned(str(number)), run.status, None, run) for number, run in enumerate(runs)]
    ((first, *others),) = rankings(outcomes)
    assert len(others) == 2
    assert first.mean_s <= min(each.mean_s for each in others)
    assert not any(each.problems for each in (first, *others))
    assert ("the embedding is whole on every rank" in trainer_text(outcomes)) == bool(untied)


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_layout(ranks: RankPool) -> None:
    """An uneven vocabulary over TP, replicas of FSDP2's shards, and ZeRO's stages."""
    odd = ["--fp32", "--vocab-size=150", "--make-vocab-size-divisible-by=1"]
    whole = trained(ranks, *odd, *FSDP2, "--tensor-model-parallel-size=1")
    assert_equal_training(whole, trained(ranks, *odd, *FSDP2, "--tensor-model-parallel-size=4"), 1e-5, 1e-4)
    assert_equal_training(whole, trained(ranks, *odd, *FSDP2, "--fsdp-replicate-size=2"), 1e-5, 1e-4)
    assert_equal_training(whole, trained(ranks, *odd, *AUTOTP, "--tensor-model-parallel-size=4"), 1e-5, 1e-4)
    unsharded = trained(ranks, *odd, *AUTOTP, "--tensor-model-parallel-size=1", "--zero-stage=0")
    assert steps_of(unsharded).losses == pytest.approx(steps_of(whole).losses, rel=1e-5)


@pytest.mark.parametrize("library", [FSDP2, AUTOTP], ids=["fsdp2", "autotp"])
def test_trained_weights_are_refitted(ranks: RankPool, library: list[str]) -> None:
    """In bfloat16, to Megatron-Core: the weights that arrive are those that were trained, by their logits."""
    flags = ["--measure=train-step,refit,forward", "--refit-mode=collocated", "--num-benchmark-iterations=1"]
    found = trained(ranks, *library, *flags, "--rl-inference-tensor-model-parallel-size=4")
    assert found.refit is not None
    tested = found.refit.tested
    assert tested is not None
    assert tested.num_wrong == 0 < tested.num_compared
    assert tested.trained is not None
    assert tested.trained.agreement == 1.0
    breakdown = steps_of(found).breakdown
    assert breakdown is not None
    assert breakdown.parts_s.keys() == {"forward", "backward", "optimizer"}
    assert sum(breakdown.parts_s.values()) + breakdown.rest_s == pytest.approx(breakdown.seconds)


def test_forward_passes_of_both_libraries(ranks: RankPool) -> None:
    for library in ("fsdp2", "autotp"):
        flags = ["--measure=forward", f"--rl-inference-format={library}", "--refit-mode=collocated"]
        found: Result = ranks.run(run_scenario, [*SMALL, *STEPS, *RANKS, *flags, "--destination-world-size=4"])[0]
        assert found.status is Status.OK
        assert found.measurements["forward"].prefill.tokens_per_s > 0
