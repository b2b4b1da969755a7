"""Whole scenarios with FP8 destinations, on eight forked ranks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from refit.report.steps.cycle import cycle_lines
from refit.results.refit import RefitResult
from refit.results.result import Result
from refit.results.status import Status
from refit.results.step import ForwardResult
from tests.bench.test_runner import TINY, refit, run_scenario, sizes
from tests.ranks.pool import RankPool

pytestmark = pytest.mark.slow

WIDE = ["--hidden-size=256", "--ffn-hidden-size=768", "--moe-ffn-hidden-size=256", "--num-query-groups=8"]
WIDE += ["--moe-shared-expert-intermediate-size=256"]
COLLOCATED = "--refit-mode=collocated"


def checked(result: RefitResult) -> tuple[int, int]:
    """Blocks quantised at the source and at the destination of a refit that arrived."""
    engine, quantised = result.engines["refit"], result.quantised
    assert quantised is not None
    assert (engine.status, engine.num_wrong) == ("ok", 0)
    assert result.model is not None
    assert engine.num_compared > 3 * result.model.num_parameters
    return quantised.blocks_at_source, quantised.blocks_at_destination


@pytest.mark.one_megatron
def test_whole_blocks_are_quantised_at_the_source(ranks: RankPool) -> None:
    flags = [*WIDE, *sizes(2, 2, 1, 2), *sizes(1, 4, 1, 1, "rl-inference-"), COLLOCATED, "--refit-method=shm"]
    code, plain = refit(ranks, *flags)
    code, result = refit(ranks, *flags, "--rl-inference-dtype=fp8-block", "--check-forward")
    assert code == 0
    assert result.quantised is not None
    at_source, at_destination = checked(result)
    assert at_source > 100
    assert at_destination == 0
    assert result.quantised.reasons == {}
    assert result.model == plain.model or set(result.model.dtypes) > set(plain.model.dtypes)  # type: ignore[union-attr]
    assert result.plan is not None
    assert plain.plan is not None
    held, before = (sum(plan.destination_weights_by_rank.values()) for plan in (result.plan, plain.plan))
    assert 0.5 < held / before < 0.75, "embedding and output layer stay BF16"
    assert result.plan.wire_bytes < 0.75 * plain.plan.wire_bytes
    forward = result.engines["refit"].forward
    assert forward is not None
    assert (forward.passed, forward.skipped, forward.tolerance) == (True, None, 1e-4)


def test_cut_blocks_are_quantised_at_the_destination_beside_others(ranks: RankPool) -> None:
    """TP4 cuts 768 rows of the dense MLP into 192: one block in three is whole on a rank."""
    flags = [*WIDE, *sizes(4, 2, 1, 1), *sizes(2, 2, 1, 1, "rl-inference-"), COLLOCATED, "--refit-method=gloo"]
    code, result = refit(ranks, *flags, "--rl-inference-dtype=fp8-block", "--fp8-scale-rule=pow2")
    at_source, at_destination = checked(result)
    assert code == 0
    assert at_source > 0
    assert at_destination > 0
    assert result.quantised is not None
    assert any("row shards of 128-row blocks" in reason for reason in result.quantised.reasons)


@pytest.mark.one_megatron
@pytest.mark.parametrize("place", ["source", "destination"])
def test_mxfp8_at_a_named_place(ranks: RankPool, place: str) -> None:
    flags = [*WIDE, *sizes(2, 2, 1, 1), *sizes(4, 1, 1, 1, "rl-inference-"), "--refit-method=gloo"]
    code, result = refit(ranks, *flags, "--rl-inference-dtype=mxfp8", f"--quantise={place}", "--verify=sample")
    engine, quantised = result.engines["refit"], result.quantised
    assert quantised is not None
    assert (code, engine.status, engine.num_wrong) == (0, "ok", 0)
    assert (quantised.blocks_at_source > 0, quantised.blocks_at_destination > 0) == (
        place == "source",
        place == "destination",
    )


CYCLE = ["--seq-length=16", "--global-batch-size=4", "--num-train-steps=1", "--num-train-warmup=1"]


def test_a_cycle_with_an_fp8_destination(ranks: RankPool) -> None:
    """Both sides compute the same after training, and passes run on dequantised weights."""
    flags = [*TINY, *WIDE, *CYCLE, *sizes(1, 2, 1, 2), *sizes(2, 2, 1, 1, "rl-inference-"), "--refit-method=gloo"]
    flags += ["--measure=train-step,refit,forward", "--rl-inference-dtype=fp8-block"]
    result: Result = ranks.run(run_scenario, flags)[0]
    assert result.status is Status.OK
    assert result.refit is not None
    checked(result.refit)
    trained = result.refit.engines["refit"].trained
    assert trained is not None
    assert (trained.passed, trained.skipped, trained.tolerance) == (True, None, 1e-4)
    forward = result.measurements["forward"]
    assert isinstance(forward, ForwardResult)
    assert (forward.weights, forward.dequantised) == ("trained", True)
    assert forward.prefill is not None
    assert forward.prefill.dispatcher is not None
    assert "in BF16" in cycle_lines(result)[0]


@pytest.mark.one_megatron
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_autotp_sides_quantise_and_run_forward(ranks: RankPool) -> None:
    flags = ["--model=tiny_qwen3", "--kv-channels=128", "--num-layers=2", "--vocab-size=500", "--refit-method=gloo"]
    flags += ["--num-benchmark-iterations=1", "--num-benchmark-warmup=0", "--check-forward", *CYCLE[:1]]
    flags += ["--tensor-model-parallel-size=2", "--rl-inference-format=autotp", "--destination-world-size=4"]
    flags += ["--rl-inference-dtype=fp8-block", "--measure=refit,forward"]
    result: Result = ranks.run(run_scenario, flags)[0]
    assert result.status is Status.OK
    assert result.refit is not None
    assert result.refit.engines["refit"].num_wrong == 0
    assert result.refit.quantised is not None
    assert result.refit.quantised.blocks_at_source > 0
    check = result.refit.engines["refit"].forward
    assert check is not None
    assert (check.passed, check.skipped, check.tolerance) == (True, None, 1e-4)
    forward = result.measurements["forward"]
    assert isinstance(forward, ForwardResult)
    assert (forward.weights, forward.dequantised, forward.status) == ("initial", True, Status.OK)


@pytest.mark.one_megatron
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("source", ["megatron", "fsdp2"])
def test_fsdp2_sides_quantise_too(ranks: RankPool, source: str) -> None:
    flags = ["--model=tiny_qwen3_moe", "--refit-method=gloo", "--num-benchmark-iterations=1", "--check-forward"]
    flags += ["--rl-inference-dtype=mxfp8", "--tensor-model-parallel-size=2", "--rl-inference-format"]
    if source == "fsdp2":
        flags += ["megatron", "--source-format=fsdp2", "--source-world-size=4"]
    else:
        flags += ["fsdp2", "--destination-world-size=4"]
    answers = ranks.run(run_scenario, flags)
    result = answers[0].measurements["refit"]
    assert answers[0].exit_code == 0
    at_source, _ = checked(result)
    assert at_source > 0
    forward = result.engines["refit"].forward
    assert (forward.passed, forward.skipped) == (True, None)
