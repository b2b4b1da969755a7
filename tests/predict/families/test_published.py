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
from tests.predict.families.published import (
    CONFIGS,
    FLASH,
    GLM,
    GPT_OSS,
    KIMI,
    LLAMA,
    MINIMAX,
    QWEN3_NEXT,
    SIZES,
    V2_LITE,
)


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
