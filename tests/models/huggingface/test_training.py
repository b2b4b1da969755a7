"""Training steps by FSDP2 and AutoTP are those of Megatron-Core: losses, gradients' norms, and the weights refitted."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch

from refit.bench.measurements import train_step
from refit.bench.measurements.train_step import tokens_of
from refit.cli.parsing import parse
from refit.config.shape import Dtype
from refit.config.steps import Recompute, StepSettings
from refit.models.autotp.training import AutotpTrainer
from refit.models.fsdp2.training import Fsdp2Trainer
from refit.models.huggingface.model import compute_rotary_buffers, materialise, meta_model
from refit.models.huggingface.training import recompute_layers
from refit.models.megatron import training as megatron_training
from refit.predict.families.names import named_model
from refit.report.steps.trainers import rankings, trainer_text
from refit.results.outcomes import Outcome
from refit.results.result import Result
from refit.results.status import Status
from refit.results.step import StepResult
from tests.bench.test_runner import run_scenario
from tests.models.huggingface.sides import alone
from tests.ranks.pool import RankPool
from tests.report.factories import planned

pytestmark = pytest.mark.slow

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


def trained(ranks: RankPool, *flags: str, base: Sequence[str] = TRAIN) -> Result:
    found: Result = ranks.run(run_scenario, [*base, *flags])[0]
    assert found.status is Status.OK
    return found


def steps_of(result: Result) -> StepResult:
    found: Any = result.measurements["train-step"]
    assert isinstance(found, StepResult)
    return found


def norms_of(result: StepResult) -> list[float | None]:
    return [sample.grad_norm for sample in result.samples]


def assert_equal_training(one: Result, other: Result, tolerance: float, norms: float) -> None:
    first, second = steps_of(one), steps_of(other)
    assert second.losses == pytest.approx(first.losses, rel=tolerance)
    assert norms_of(second) == pytest.approx(norms_of(first), rel=norms)


@pytest.mark.parametrize("untied", [[], pytest.param([UNTIED], marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_three_libraries_take_the_same_steps(ranks: RankPool, untied: list[str]) -> None:
    """In float32, on TP2 DP2 with two micro-batches: gradients are averaged, summed over TP where a rank has a part,
    and clipped (the norms are above 0.5) as Megatron-Core does it."""
    flags = ["--fp32", *untied]
    runs = [trained(ranks, *flags, *library) for library in ([], FSDP2, [*AUTOTP, "--zero-stage=2"])]
    assert all(norm is not None and norm > 0.5 for norm in norms_of(steps_of(runs[0])))
    for run in runs[1:]:
        assert_equal_training(runs[0], run, tolerance=1e-5, norms=1e-3)
    outcomes = [Outcome(planned(str(number)), run.status, None, run) for number, run in enumerate(runs)]
    ((first, *others),) = rankings(outcomes)
    assert len(others) == 2
    assert first.arm.mean_s <= min(each.arm.mean_s for each in others)
    assert not any(each.problems for each in (first, *others))
    assert ("the embedding is whole on every rank" in trainer_text(outcomes)) == bool(untied)


@pytest.mark.no_megatron
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


EXPERTS = ["--num-layers=2", "--hidden-size=64", "--ffn-hidden-size=96", "--refit-method=gloo", *STEPS, "--fp32"]
EXPERTS += ["--source-world-size=4", "--measure=train-step", "--num-train-warmup=1"]
EP2, TP2 = "--expert-model-parallel-size=2", "--tensor-model-parallel-size=2"
MODELS = {
    "tiny_deepseek_v3": ["--model=tiny_deepseek_v3", "--moe-layer-freq=([0]*1+[1]*1)"],
    "tiny_qwen3_moe": ["--model=tiny_qwen3_moe"],
}


@pytest.mark.parametrize("model", ["tiny_deepseek_v3", pytest.param("tiny_qwen3_moe", marks=pytest.mark.slow)])
def test_experts_are_trained_alike(ranks: RankPool, model: str) -> None:
    """In float32: experts over a mesh of their own, biases that follow their loads, one rotary key for all heads. Each
    of these, left out, changes norms by more than 1e-3. Measured: losses within 6e-7, norms within 3e-4."""
    flags = [*EXPERTS, *MODELS[model]]
    megatron = steps_of(trained(ranks, *flags, EP2, base=()))
    for library in ([*FSDP2, EP2, TP2], [*AUTOTP, TP2]):
        found = steps_of(trained(ranks, *flags, *library, base=()))
        assert found.losses == pytest.approx(megatron.losses, rel=2e-6)
        assert norms_of(found) == pytest.approx(norms_of(megatron), rel=1e-3)


@pytest.mark.no_megatron
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_experts_do_not_depend_on_the_layout(ranks: RankPool, model: str) -> None:
    flags = [*EXPERTS, *MODELS[model], *FSDP2]
    whole = steps_of(trained(ranks, *flags, base=()))
    for sizes in (["--expert-model-parallel-size=4"], [EP2, "--fsdp-replicate-size=2"], [EP2, TP2, *RECOMPUTE]):
        found = steps_of(trained(ranks, *flags, *sizes, base=()))
        assert found.losses == pytest.approx(whole.losses, rel=2e-6)
        assert norms_of(found) == pytest.approx(norms_of(whole), rel=1e-4)


@pytest.mark.no_megatron
def test_ranks_whose_experts_get_no_token_take_part(ranks: RankPool) -> None:
    """Four tokens of one choice each, over eight experts of four ranks."""
    flags = [
        *EXPERTS,
        "--model=tiny_qwen3_moe",
        *FSDP2,
        "--seq-length=1",
        "--micro-batch-size=1",
        "--moe-router-topk=1",
    ]
    flags += ["--global-batch-size=4"]
    whole = steps_of(trained(ranks, *flags, base=()))
    spread = steps_of(trained(ranks, *flags, "--expert-model-parallel-size=4", base=()))
    assert spread.losses == pytest.approx(whole.losses, rel=2e-6)


RECOMPUTE = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]


@pytest.mark.no_megatron
@pytest.mark.parametrize("library", [FSDP2, pytest.param(AUTOTP, marks=pytest.mark.slow)], ids=["fsdp2", "autotp"])
def test_recomputation_changes_no_loss(ranks: RankPool, library: list[str]) -> None:
    stored = steps_of(trained(ranks, *library))
    for flags in (RECOMPUTE, [*RECOMPUTE, "--recompute-method=block"]):
        again = steps_of(trained(ranks, *library, *flags))
        assert again.losses == stored.losses
        assert norms_of(again) == norms_of(stored)


@pytest.mark.parametrize(("recompute", "calls"), [(("uniform", 1), 6), (("block", 1), 4), ((None, None), 3)])
def test_layers_are_computed_again(recompute: tuple[str | None, int | None], calls: int) -> None:
    """Three layers in all: each runs once forward, and once more in the backward pass where it is computed again."""
    shape = parse(["--model=tiny_qwen3", "--num-layers=3", "--hidden-size=64", "--refit-method=gloo"]).scenario.model
    assert shape is not None
    model = meta_model(shape, named_model(shape, Dtype.FP32), alone(Dtype.FP32))
    materialise(model, torch.device("cpu"))
    compute_rotary_buffers(model, torch.device("cpu"))
    method, num_layers = recompute
    recompute_layers(model, Recompute("full" if method else None, method, num_layers))
    seen: list[None] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: seen.append(None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.train()
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    assert len(seen) == calls


@pytest.mark.parametrize("library", [[], FSDP2, AUTOTP], ids=["megatron", "fsdp2", "autotp"])
def test_overflow_skips_the_step(ranks: RankPool, library: list[str]) -> None:
    """In float16, with a loss scale that no gradient stands."""
    found = steps_of(trained(ranks, "--fp16", "--initial-loss-scale=4294967296", "--num-train-steps=1", *library))
    assert [sample.skipped for sample in found.samples] == [True, True]
    assert norms_of(found) == [None, None]
    assert found.num_skipped == 2


@pytest.mark.one_megatron
@pytest.mark.parametrize(
    ("library", "wrong"),
    [([], "3 of 4 steps are"), (FSDP2, "3 of 4 steps are"), (AUTOTP, "1 of 4 steps is")],
    ids=["megatron", "fsdp2", "autotp"],
)
def test_gradients_that_are_not_finite_are_wrong_data(ranks: RankPool, library: list[str], wrong: str) -> None:
    """In bfloat16, which has no overflows to skip. DeepSpeed leaves that step out all the same; with the others the
    weights are NaN after it."""
    found: Result = ranks.run(run_without_gradients, [*TRAIN, *library])[0]
    steps = steps_of(found)
    assert found.status is steps.status is Status.WRONG_DATA
    assert steps.samples[1].loss is not None
    assert steps.samples[1].not_finite.keys() == {"grad_norm"}
    assert not steps.num_skipped
    assert steps.reason is not None
    assert re.match(rf"gradient norm of train step 1/2 is (nan|inf) \({wrong} not finite\): ", steps.reason)


class _NoGradient(torch.autograd.Function):
    """Passes a loss on, and makes its gradient infinite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.inf


def run_without_gradients(rank: int, flags: list[str]) -> Result:
    """The losses of the second step, of all ranks, have infinite gradients."""
    number = 0

    def tokens(steps: StepSettings, step: int, vocab_size: int) -> torch.Tensor:
        nonlocal number
        number = step
        return tokens_of(steps, step, vocab_size)

    def spoilt(loss: torch.Tensor) -> torch.Tensor:
        passed: torch.Tensor = _NoGradient.apply(loss) if number == 1 else loss  # type: ignore[no-untyped-call]
        return passed

    def megatron_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, reported = mean_loss(losses)
        return spoilt(mean), reported

    mean_loss = megatron_training._mean_loss
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(train_step, "tokens_of", tokens))
        stack.enter_context(patch.object(megatron_training, "_mean_loss", megatron_loss))
        for trainer in (Fsdp2Trainer, AutotpTrainer):
            loss = trainer._loss
            changed = lambda self, *batch, loss=loss: spoilt(loss(self, *batch))  # noqa: E731
            stack.enter_context(patch.object(trainer, "_loss", changed))
        found: Result = run_scenario(rank, flags)
    return found


@pytest.mark.one_megatron
@pytest.mark.slow
def test_float16_is_trained_alike(ranks: RankPool) -> None:
    """Measured: losses within 2e-5, norms within 2e-3."""
    first, *others = (steps_of(trained(ranks, "--fp16", *library)) for library in ([], FSDP2, AUTOTP))
    for found in others:
        assert not found.num_skipped
        assert found.losses == pytest.approx(first.losses, rel=1e-4)
        assert norms_of(found) == pytest.approx(norms_of(first), rel=1e-2)


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


@pytest.mark.one_megatron
@pytest.mark.slow
@pytest.mark.parametrize("library", [[*FSDP2, EP2], AUTOTP], ids=["fsdp2", "autotp"])
def test_trained_experts_are_refitted(ranks: RankPool, library: list[str]) -> None:
    """In float32, to Megatron-Core with experts over all ranks: biases that training has moved are refitted too."""
    flags = [*EXPERTS, *MODELS["tiny_deepseek_v3"], *library, "--measure=train-step,refit,forward"]
    flags += ["--refit-mode=collocated", "--num-benchmark-iterations=1", "--rl-inference-expert-model-parallel-size=4"]
    found = trained(ranks, *flags, base=())
    tested = found.refit.tested if found.refit else None
    assert tested is not None
    assert tested.num_wrong == 0 < tested.num_compared
    assert tested.trained is not None
    assert tested.trained.agreement == 1.0


def test_forward_passes_of_both_libraries(ranks: RankPool) -> None:
    for library in ("fsdp2", "autotp"):
        flags = ["--measure=forward", f"--rl-inference-format={library}", "--refit-mode=collocated"]
        found: Result = ranks.run(run_scenario, [*SMALL, *STEPS, *RANKS, *flags, "--destination-world-size=4"])[0]
        assert found.status is Status.OK
        assert found.measurements["forward"].prefill.tokens_per_s > 0
