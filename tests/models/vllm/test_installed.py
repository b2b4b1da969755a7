"""Where vLLM is installed: the parameters of its own model classes are those that are predicted.

vLLM builds the model on the meta device, on one rank, from the config.json that describes the same ModelShape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refit.predict.families.config_json import config_values
from refit.predict.families.tables import closest_family
from refit.predict.vllm.engine import Place
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import Engines
from tests.predict.test_vllm import preset, side

ARCHITECTURES = {
    "tiny_llama": "LlamaForCausalLM",
    "tiny_qwen2": "Qwen2ForCausalLM",
    "tiny_qwen3": "Qwen3ForCausalLM",
    "tiny_qwen3_moe": "Qwen3MoeForCausalLM",
    "tiny_mixtral": "MixtralForCausalLM",
    "tiny_glm4_moe": "Glm4MoeForCausalLM",
    "tiny_minimax_m2": "MiniMaxM2ForCausalLM",
    "tiny_glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "tiny_deepseek_v2": "DeepseekV2ForCausalLM",
    "tiny_deepseek_v3": "DeepseekV3ForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_vllms_own_parameters_are_those_that_are_predicted(tmp_path: Path, model: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    shape = preset(model)
    values = {**config_values(shape), "architectures": [ARCHITECTURES[model]], "topk_method": "noaux_tc"}
    values |= closest_family(shape).engine_values(shape)
    (tmp_path / "config.json").write_text(json.dumps(values))
    predicted = {
        f"{block.block.prefix}{parameter.name}": (parameter.shape, parameter.dtype)
        for block in Engines(shape, side()).blocks_of(Place(0, 0, 0, 0))
        for parameter in block.parameters
    }
    assert parameters_of_vllm(tmp_path) == predicted


def parameters_of_vllm(folder: Path) -> dict[str, Any]:
    """Name, as predictions spell it -> shape and dtype of every parameter of vLLM's model for the config.json in
    `folder`."""
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model

    chosen = VllmConfig(model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"))
    with set_current_vllm_config(chosen):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
        initialize_model_parallel()
        with torch.device("meta"):
            model = initialize_model(chosen)
    return {
        followed_name(name): (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
    }
