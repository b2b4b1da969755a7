"""Presets of published models: as many parameters as their authors state, and the configuration that they publish."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.megatron import predict

SIZES: dict[str, int] = {
    # model.safetensors.index.json's total size / 2 bytes, and the counts that Hugging Face shows:
    "llama3_8b": 8_030_261_248,  # meta-llama/Llama-3.1-8B
    "llama3_70b": 70_553_706_496,  # meta-llama/Llama-3.1-70B
    "deepseek_v2_lite": 15_706_484_224,  # deepseek-ai/DeepSeek-V2-Lite
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "qwen2_5_7b": 7_615_616_512,  # Qwen/Qwen2.5-7B
    # What ollama and llama.cpp count of OpenAI's checkpoints; the model card (arXiv:2508.10925) has 20.91 B, 116.83 B:
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
}

# The keys of config.json in those repositories that say something about the weights or the forward pass.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
AIR = GLM | {
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_hidden_layers": 46,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
FLASH: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
MINIMAX: dict[str, Any] = {
    "model_type": "minimax_m2",
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
KIMI: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
CONFIGS = {
    "kimi_k2": KIMI,
    "gpt_oss_120b": GPT_OSS,
    "gpt_oss_20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "glm4_7_flash": FLASH,
    "qwen3_next_80b_a3b": QWEN3_NEXT,
    "minimax_m2": MINIMAX,
    "llama3_8b": LLAMA,
    "deepseek_v2_lite": V2_LITE,
    "qwen2_5_7b": QWEN2,
    "mixtral_8x7b": MIXTRAL,
    "glm4_5": GLM,
    "glm4_5_air": AIR,
}


def parameters(*flags: str) -> dict[str, int]:
    """Logical tensor -> elements, without buffers."""
    shape = parse(["--dry-run", *flags]).scenario.model
    assert shape is not None
    tensors = predict(shape, SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1))).tensors
    return {key: math.prod(each.shape) for key, each in tensors.items() if not key.endswith("expert_bias")}


@pytest.mark.parametrize("preset", SIZES)
def test_a_preset_has_as_many_parameters_as_published(preset: str) -> None:
    assert sum(parameters("--model", preset).values()) == SIZES[preset]


@pytest.mark.parametrize(
    ("preset", "published", "hidden", "routed", "experts"),
    [("glm4_5", 358_337_791_296, 5120, 90, 160), ("glm4_5_air", 110_468_824_832, 4096, 46, 128)],
)
def test_a_glm_has_as_many_with_its_prediction_layer(
    preset: str, published: int, hidden: int, routed: int, experts: int
) -> None:
    """The counts that Hugging Face shows of zai-org/GLM-4.5 and GLM-4.5-Air: with expert biases, and copies of
    embedding and output layer in the prediction layer."""
    found = parameters("--model", preset, "--mtp-num-layers", "1")
    assert sum(found.values()) + routed * experts + 2 * 151552 * hidden == published


def test_a_glm_flash_has_as_many_with_its_prediction_layer() -> None:
    """The count that Hugging Face shows of zai-org/GLM-4.7-Flash, as for the other GLMs."""
    found = parameters("--model", "glm4_7_flash", "--mtp-num-layers", "1")
    assert sum(found.values()) + 47 * 64 + 2 * 154880 * 2048 == 31_221_488_576


def test_a_qwen3_next_has_as_many_with_its_prediction_layer() -> None:
    """The count that Hugging Face shows of Qwen/Qwen3-Next-80B-A3B-Instruct, and the model card's 79 B outside of the
    embeddings."""
    found = parameters("--model", "qwen3_next_80b_a3b", "--mtp-num-layers", "1")
    assert sum(found.values()) == 81_324_862_720
    others = [size for key, size in found.items() if not key.startswith(("mtp.", "embedding.", "output_layer."))]
    assert sum(others) == 79_052_061_440


def test_a_kimi_k2_has_as_many_as_published(tmp_path: Path) -> None:
    """By its own config.json, and as moonshotai/Kimi-K2-Instruct's files have, with expert biases."""
    (tmp_path / "config.json").write_text(json.dumps(KIMI))
    for model in ("--model=kimi_k2", f"--hf-config={tmp_path}"):
        assert sum(parameters(model).values()) + 60 * 384 == 1_026_408_232_448


def test_a_minimax_has_as_many_as_published() -> None:
    """The counts that Hugging Face shows of MiniMaxAI/MiniMax-M2.1, and of MiniMax-M2 with its FP8 scales."""
    found = parameters("--model", "minimax_m2")
    assert sum(found.values()) + 62 * 256 == 228_689_764_864
    quantised = sum(size for key, size in found.items() if ".linear_" in key)
    assert sum(found.values()) + 62 * 256 + quantised // 128**2 == 228_703_644_928


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GPT_OSS | {"attention_bias": False}, "attention_bias is False, True is needed: its attention has biases"),
        (GPT_OSS | {"experts_per_token": 8}, "experts_per_token is 8, a gpt_oss needs num_experts_per_tok = 4"),
        (MINIMAX | {"use_qk_norm": False}, "use_qk_norm is False, True is needed: the family has norms"),
        (MINIMAX | {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head', 'per_layer' is needed"),
        (MINIMAX | {"use_routing_bias": False}, "use_routing_bias is False, True is needed"),
        (MINIMAX | {"shared_intermediate_size": 512}, "shared_intermediate_size is 512, 0 is needed"),
        (MINIMAX | {"attn_type_list": [0, 1] * 31}, "attn_type_list has other layers than 1, full attention"),
        (QWEN3_NEXT | {"layer_types": ["linear_attention"] * 47}, "layer_types must list 48 layers, got"),
        (
            QWEN3_NEXT | {"layer_types": ["sliding_attention"] * 48},
            "layer_types has .sliding_attention., known are",
        ),
        (QWEN3_NEXT | {"layer_types": ["mamba"] * 48}, "layer_types has 'mamba', known are full_attention, linear_att"),
        (QWEN3_NEXT | {"full_attention_interval": 0}, "full_attention_interval must be a whole number from 1"),
        (QWEN3_NEXT | {"linear_num_value_heads": 24}, "24 value heads of delta nets cannot be divided by 16 key heads"),
        (FLASH | {"mlp_layer_types": ["dense"] * 46}, "mlp_layer_types must list 47 layers as dense or sparse"),
        (FLASH | {"mlp_layer_types": ["dense"] * 47}, "mlp_layer_types of 47 layers leaves none with experts"),
    ],
)
def test_other_models_of_the_same_name_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--hf-config", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-layer-freq=2"], "a minimax_m2 has experts in every layer, here layer 1 has none"),
        (["--source-format=autotp", "--tensor-model-parallel-size=2"], "AutoTP leaves norms whole, .*give TP 1"),
        (["--source-format=megatron", "--tensor-model-parallel-size=8"], "4 query groups over TP size 8"),
        (["--normalization=LayerNorm"], "--qk-norm-over-heads needs --normalization RMSNorm"),
    ],
)
def test_a_minimax_that_cannot_be_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_minimax_m2", "--source-format=fsdp2", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-layer-freq=2"], "a gpt_oss has experts in every layer, here layer 1 has none"),
        (["--moe-ffn-hidden-size=64"], "give --ffn-hidden-size 64, that of the experts"),
        (["--disable-bias-linear"], "for gpt_oss leave --disable-bias-linear out"),
        (["--source-format=autotp", "--tensor-model-parallel-size=2"], "AutoTP leaves sinks whole, .*give TP 1"),
        (["--tensor-model-parallel-size=2", "--source-format=megatron"], "biases in routed experts with ETP size 2"),
        (["--rl-inference-format=vllm", "--rl-inference-tensor-model-parallel-size=2"], r"give .* 2 \(whole experts\)"),
        (
            ["--rl-inference-format=vllm", "--rl-inference-dtype=fp8-block", "--kv-channels=64"],
            "has gate and up rows in turn, blocks of fp8-block would have rows of both: ",
        ),
        (["--attn-impl=flash_attention_2"], "a gpt_oss runs with eager attention here: give --attn-impl eager"),
        (["--swiglu"], "--quick-geglu contradicts --swiglu: give one of them"),
    ],
)
def test_a_gpt_oss_that_cannot_be_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_gpt_oss", "--source-format=fsdp2", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-router-topk=1"], "for qwen3_next give --moe-router-topk 2 or more"),
        (
            ["--source-format=autotp", "--tensor-model-parallel-size=2"],
            "delta nets are built with TP 1 only, .* size 2",
        ),
        (["--source-format=megatron", "--tensor-model-parallel-size=8"], "4 key heads of delta nets .* TP size 8"),
        (["--source-format=megatron", "--mtp-num-layers=1", "--num-layers=3"], "the last layer, .*, has a delta net"),
        (["--rl-inference-format=vllm", "--rl-inference-tensor-model-parallel-size=8"], "4 key heads of delta nets"),
        (["--linear-attention-freq=[1,0,1]"], "--linear-attention-freq lists 3 layers, the model has 2"),
        (["--multi-latent-attention"], "contradicts --multi-latent-attention"),
    ],
)
def test_a_qwen3_next_that_cannot_be_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_qwen3_next", "--source-format=fsdp2", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--linear-num-key-heads=4"], "--linear-num-key-heads needs --experimental-attention-variant"),
        (["--experimental-attention-variant=gated_delta_net"], "needs --linear-attention-freq: give 4"),
        (["--moe-shared-expert-gate"], "--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size"),
        (["--attention-output-gate", "--source-format=fsdp2"], "for qwen3_moe leave --attention-output-gate out"),
    ],
)
def test_flags_of_a_qwen3_next_alone_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_qwen3_moe", *flags])


def test_a_deepseek_v2_with_an_expert_bias_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE | {"topk_method": "noaux_tc"}))
    with pytest.raises(UsageError, match="a router with an expert bias: give model_type deepseek_v3"):
        parse(["--dry-run", "--hf-config", str(tmp_path)])


@pytest.mark.parametrize(("key", "value"), [("use_qk_norm", 1), ("attention_bias", "yes")])
def test_a_switch_is_true_or_false(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GLM | {key: value}))
    with pytest.raises(UsageError, match=f"{key} must be true or false, got {value!r}"):
        parse(["--dry-run", "--hf-config", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--moe-ffn-hidden-size=64"], "give --ffn-hidden-size 64, that of the experts"),
        (["--moe-router-topk=1"], "for mixtral give --moe-router-topk 2 or more"),
        (
            ["--moe-layer-freq=2"],
            "a mixtral has experts in every layer, here layer 1 has none: give --moe-layer-freq 1",
        ),
    ],
)
def test_a_mixtral_of_other_sizes_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(["--dry-run", "--model=tiny_mixtral", "--source-format=fsdp2", *flags])


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_published_config_json_is_the_preset(tmp_path: Path, preset: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[preset]))
    read = parse(["--dry-run", "--hf-config", str(tmp_path)]).scenario
    assert read.model == parse(["--dry-run", "--model", preset]).scenario.model
    assert any("no weight depends on it: " in note and "rope_theta" in note for note in read.notes)


def test_a_llama_without_grouped_queries_has_a_key_for_every_head(tmp_path: Path) -> None:
    """As Llama 2's config.json, which has neither num_key_value_heads nor head_dim."""
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = parse(["--dry-run", "--hf-config", str(tmp_path)]).scenario.model
    assert shape is not None
    assert (shape.num_query_groups, shape.kv_channels) == (32, 128)
