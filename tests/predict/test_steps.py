"""Operations and memory of training steps, against published figures and direct counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.config.steps import Recompute
from refit.predict.flops import forward_flops, train_flops
from refit.predict.sides import predict_side, training_bytes
from refit.predict.training_memory import GRADIENT_BYTES, OPTIMIZER_BYTES, training_memory


def scenario(*flags: str) -> Scenario:
    return parse([*flags, "--dry-run"]).scenario


def test_operations_of_kimi_k2_are_six_per_active_parameter() -> None:
    """Without attention scores (one token), a step takes 6 operations per parameter that a token meets: 32.86 B of
    Kimi K2's 1.026 T are active, less the input embedding of 1.174 B, which is looked up, and the norms."""
    model = scenario("--model", "kimi_k2").model
    assert model is not None
    active = 32.86e9 - 1.174e9
    scores = 6 * model.num_attention_heads * (192 + 128) / 2 * model.num_layers
    assert train_flops(model, 1, 1) - scores == pytest.approx(6 * active, rel=2e-3)


def test_operations_of_a_dense_model_counted_by_hand() -> None:
    model = scenario("--model", "tiny").model
    assert model is not None
    dense = replace(model, experts=None)
    attention = 256 * 256 * 2 + 256 * 32 * 4 * 2
    per_token = 2 * (model.num_layers * (attention + 3 * 256 * 1024) + 256 * 4096)
    scores = model.num_layers * 8 * (32 + 32) * 64
    assert forward_flops(dense, 2, 64) == 2 * 64 * (per_token + scores)
    assert train_flops(dense, 2, 64) == 3 * forward_flops(dense, 2, 64)


FLAGS = ["--model", "kimi_k2", "--measure", "train-step", "--expert-model-parallel-size", "32", "--seq-length", "4096"]
FLAGS += ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8", "--source-world-size", "256"]
FLAGS += ["--expert-tensor-parallel-size", "1", "--sequence-parallel", "--global-batch-size", "256"]
FLAGS += ["--pipeline-model-parallel-layout", "Et*7|(t*8|)*6t*6L"]


def test_optimizer_states_are_divided_over_replicas() -> None:
    found = scenario(*FLAGS)
    memory = training_bytes(found)
    assert found.model is not None
    sharding = predict_side(found.model, found.source)
    total = sharding.num_parameters
    # Each replica's part of the states: 12 bytes for every parameter of the model, once.
    assert sum(each.optimizer_bytes for each in memory.values()) == pytest.approx(OPTIMIZER_BYTES * total, rel=0.01)
    held = sharding.bytes_per_rank[0] / 2  # bfloat16
    assert memory[0].gradient_bytes == pytest.approx(GRADIENT_BYTES * held, rel=1e-3)


def test_recomputation_and_smaller_batches_need_less() -> None:
    found = scenario(*FLAGS)
    assert found.model is not None
    assert found.steps is not None
    sharding = predict_side(found.model, found.source)

    def activations(**changes: object) -> int:
        steps = replace(found.steps, **changes)  # type: ignore[type-var]
        return max(
            each.activation_bytes for each in training_memory(found.model, found.source, sharding, steps).values()
        )  # type: ignore[arg-type]

    stored = activations()
    least = activations(recompute=Recompute("full", "uniform", 1))
    assert least < stored / 4
    assert activations(recompute=Recompute("full", "block", 61)) == least
    halves = [activations(recompute=Recompute("full", "block", number)) for number in (4, 1)]
    assert least < halves[0] < halves[1] < stored
    assert least < activations(recompute=Recompute("full", "uniform", 4)) < halves[0]
    assert activations(recompute=Recompute("selective", modules=("moe",))) < stored
    assert activations(micro_batch_size=4) == pytest.approx(4 * stored, rel=0.01)
    assert activations(sequence_parallel=False) > stored


def test_the_first_stage_holds_the_most_micro_batches() -> None:
    """1F1B: stage s of p has p - s of them in flight. Stages 1 to 6 have 8 layers each."""
    found = scenario(*FLAGS)
    memory = training_bytes(found)
    first, second = (memory[found.source.ranks[32 * stage]].activation_bytes for stage in (1, 2))
    assert first / second == pytest.approx(7 / 6, rel=1e-6)


def test_the_dry_run_counts_what_training_needs() -> None:
    from refit.predict.dry_run import DryRunOptions, dry_run
    from refit.report.plans.dry_run import dry_run_text

    run = dry_run(scenario(*FLAGS), DryRunOptions())
    assert run.num_gpus == 256
    rank = max(run.source_bytes, key=lambda each: run.source_bytes[each] + run.training[each].total_bytes)
    assert run.memory_bytes == run.source_bytes[rank] + run.training[rank].total_bytes + run.scenario.staging_bytes
    text = dry_run_text(run)
    assert "Training (estimate)" in text
    assert "Payload" not in text
