"""Memory of training by FSDP2 and AutoTP, against counts by hand: bytes of a parameter over what divides them."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.predict.sides import predict_side, training_bytes
from refit.predict.training_memory import TrainingMemory, parameters_of

FLAGS = ["--model=tiny_qwen3", "--measure=train-step", "--refit-method=gloo", "--source-world-size=4"]
FLAGS += ["--tensor-model-parallel-size=2", "--dry-run"]


TP1 = ["--tensor-model-parallel-size=1"]
EXPERTS = ["--model=tiny_qwen3_moe", "--expert-model-parallel-size=4"]


def memory(*flags: str) -> tuple[TrainingMemory, int]:
    """The estimate for the first rank, and the elements that it holds."""
    scenario = parse([*FLAGS, *flags]).scenario
    assert scenario.model is not None
    shards = predict_side(scenario.model, scenario.source).of_rank(0).shards.values()
    return training_bytes(scenario)[0], sum(box.volume for shard in shards for box in shard.boxes)


@pytest.mark.parametrize(
    ("flags", "gradients", "states"),
    [
        (["--source-format=fsdp2", "--global-batch-size=2"], 4, 12),
        (["--source-format=fsdp2", "--global-batch-size=4"], 8, 12),  # adds up what both shards have
        (["--source-format=fsdp2", "--global-batch-size=2", "--fp32"], 4, 8),
        (["--source-format=autotp"], 2, 6),
        (["--source-format=autotp", "--zero-stage=2"], 1, 6),
        (["--source-format=autotp", "--fp32"], 4, 6),  # ZeRO copies parameters of float32 too
        (["--source-format=autotp", "--zero-stage=0", "--fp32", "--tensor-model-parallel-size=1"], 4, 8),
        (["--source-format=fsdp2", "--global-batch-size=2", "--autocast"], 4, 8),
        (["--source-format=autotp", "--autocast"], 4, 6),
    ],
)
def test_bytes_of_a_parameter(flags: list[str], gradients: int, states: int) -> None:
    found, held = memory(*flags)
    assert found.gradient_bytes == gradients * held
    assert found.optimizer_bytes == states * held
    assert found.activation_bytes > 0


@pytest.mark.parametrize(
    ("flags", "step"),
    [([], 4), (["--zero-stage=2"], 4), (["--fp32"], 4), (["--zero-stage=0", "--fp32", *TP1], 0), (TP1, 2)],
    ids=["stage 1", "stage 2", "float32", "stage 0", "four replicas"],
)
def test_zeros_step_copies_the_gradients_of_a_rank(flags: list[str], step: int) -> None:
    """Twice in the parameters' dtype, and once in float32 where that is another, of 2 or 4 replicas' parts."""
    found, held = memory("--source-format=autotp", *flags)
    assert found.step_bytes == step * held
    assert found.total_bytes == found.optimizer_bytes + max(found.backward_bytes, found.step_bytes)


def test_a_backward_pass_begins_with_gathered_weights() -> None:
    """Of TP2's half: what is outside layers, two of them, and the output layer's gradient."""
    scenario = parse([*FLAGS, "--source-format=fsdp2"]).scenario
    assert scenario.model is not None
    whole, _ = parameters_of(predict_side(scenario.model, scenario.source), 0)
    in_layers, _ = parameters_of(predict_side(scenario.model, scenario.source), 0, ".layers.")
    shape = scenario.model
    gathered = 2 * (whole - in_layers) + 2 * 2 * in_layers // shape.num_layers
    found, _ = memory("--source-format=fsdp2")
    assert found.unsharded_bytes == 2 * (gathered + shape.vocab_size * shape.hidden_size // 2)
    assert found.backward_bytes == found.gradient_bytes + found.activation_bytes + found.unsharded_bytes


def test_experts_add_up_over_their_own_shards() -> None:
    """TP2 EP4 on 4 ranks: dense layers have two shards, experts one."""
    found, held = memory("--source-format=fsdp2", "--global-batch-size=4", *EXPERTS)
    scenario = parse([*FLAGS, "--source-format=fsdp2", *EXPERTS]).scenario
    assert scenario.model is not None
    dense, routed = parameters_of(predict_side(scenario.model, scenario.source), 0)
    assert dense + routed == held
    assert found.gradient_bytes == 4 * (2 * dense + routed)
    again, _ = memory("--source-format=fsdp2", "--global-batch-size=4", *EXPERTS, *RECOMPUTE)
    assert again.activation_bytes < found.activation_bytes


RECOMPUTE = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
