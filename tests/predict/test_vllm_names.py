"""vLLM's names of one parameter: the version that is followed, older spellings and aliases."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.predict.vllm.engine import Place
from refit.predict.vllm.names import FOLLOWED, followed_name
from refit.predict.vllm.parameters import Engines
from tests.predict.test_vllm import preset, side

MLP, SPARSE = "model.layers.1.mlp", "model.layers.1.block_sparse_moe"


@pytest.mark.parametrize(
    ("name", "followed"),
    [
        (f"{MLP}.experts.w13_weight", f"{MLP}.experts.routed_experts.w13_weight"),
        ("model.layers.1.block_sparse_moe.experts.w2_weight", f"{SPARSE}.experts.routed_experts.w2_weight"),
        (f"{MLP}.experts.w2_weight", f"{MLP}.experts.routed_experts.w2_weight"),
        (f"{MLP}.experts.w13_weight_scale_inv", f"{MLP}.experts.routed_experts.w13_weight_scale_inv"),
        (f"{MLP}.experts.w2_weight_scale", f"{MLP}.experts.routed_experts.w2_weight_scale"),
        (f"{MLP}.experts.routed_experts.e_score_correction_bias", f"{MLP}.gate.e_score_correction_bias"),
        (f"{MLP}.experts.e_score_correction_bias", f"{MLP}.gate.e_score_correction_bias"),
    ],
)
def test_other_spellings_are_known(name: str, followed: str) -> None:
    assert followed_name(name) == followed


@pytest.mark.parametrize(
    "model",
    [
        "tiny_qwen2",
        "tiny_mixtral",
        "tiny_glm4_moe",
        "tiny_minimax_m2",
        "tiny_glm4_moe_lite",
        "tiny_qwen3",
        "tiny_qwen3_moe",
        "tiny_deepseek_v3",
    ],
)
def test_a_predicted_name_is_its_own(model: str) -> None:
    blocks = Engines(preset(model), side()).blocks_of(Place(0, 0, 0, 0))
    names = [block.block.prefix + parameter.name for block in blocks for parameter in block.parameters]
    assert [followed_name(name) for name in names] == names


@pytest.mark.parametrize(("model", "said"), [("tiny_qwen3", False), ("tiny_qwen3_moe", True)])
def test_the_scenario_says_which_version_is_followed(model: str, said: bool) -> None:
    notes = parse(["--model", model, "--rl-inference-format=vllm", "--refit-method=gloo"]).scenario.notes
    assert any(f"vLLM {FOLLOWED}" in note for note in notes) is said
