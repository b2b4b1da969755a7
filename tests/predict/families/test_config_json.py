"""config.json: read as flags, written from a ModelShape, and what in it is refused or named as not honoured."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoConfig, AutoModelForCausalLM

from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.config.yaml_files import MAX_FILE_BYTES
from refit.errors import UsageError
from refit.predict.families.config_json import config_values
from refit.predict.megatron import predict
from tests.predict.families.strategies import models

# The keys that matter of Qwen/Qwen3-30B-A3B's and moonshotai/Kimi-K2-Instruct's config.json on Hugging Face.
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
KIMI_K2: dict[str, Any] = {
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8"},
    "routed_scaling_factor": 2.827,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def written(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(path: Path, *flags: str) -> tuple[ModelShape, tuple[str, ...]]:
    scenario = parse(["--dry-run", "--hf-config", str(path), *flags]).scenario
    assert scenario.model is not None
    return scenario.model, scenario.notes


@pytest.mark.parametrize(("content", "name"), [(QWEN3_30B, "qwen3_30b_a3b"), (KIMI_K2, "kimi_k2")])
def test_a_published_config_is_the_preset(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    written(tmp_path, content)
    assert read(tmp_path)[0] == parse(["--dry-run", "--model", name]).scenario.model


def test_flags_override_the_config_and_the_run_is_called_by_it(tmp_path: Path) -> None:
    path = written(tmp_path, QWEN3_30B)
    scenario = parse(["--dry-run", "--hf-config", str(path), "--vocab-size", "100", "--source-format=fsdp2"]).scenario
    assert scenario.model is not None
    assert (scenario.model.vocab_size, scenario.model_name, scenario.source.format) == (100, str(path), "fsdp2")


def test_what_is_not_honoured_is_said(tmp_path: Path) -> None:
    notes = " ".join(read(written(tmp_path, {**KIMI_K2, "num_nextn_predict_layers": 1}))[1])
    assert "routed_scaling_factor 2.827" in notes
    assert "num_nextn_predict_layers is not honoured: its layers are left out, --mtp-num-layers" in notes
    assert "quantization_config is not honoured" in notes
    assert "n_group" not in notes


def test_dense_layers_are_where_the_config_puts_them(tmp_path: Path) -> None:
    model, _ = read(written(tmp_path, {**QWEN3_30B, "num_hidden_layers": 4, "mlp_only_layers": [1, 2]}))
    assert model.experts is not None
    assert model.experts.layers == (True, False, False, True)


@given(models())
@settings(max_examples=40)
def test_a_model_survives_its_config(tmp_path_factory: pytest.TempPathFactory, shape: ModelShape) -> None:
    path = written(tmp_path_factory.mktemp("hf"), config_values(shape))
    flags = ["--make-vocab-size-divisible-by", str(shape.make_vocab_size_divisible_by)]
    if shape.experts is not None and shape.experts.grouped_gemm:
        flags.append("--moe-grouped-gemm")
    if shape.mla is not None:  # which has no `kv_channels`
        flags += ["--kv-channels", str(shape.kv_channels)]
    again, notes = read(path, *flags)
    assert again == shape
    assert not any("no weight depends" in note and "norm_topk_prob" not in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        (" " * (MAX_FILE_BYTES + 1), "more than 262,144 bytes"),
        (
            {"model_type": "gemma3"},
            "model_type 'gemma3' is of no known family, known are llama, qwen2, qwen3, mixtral, qwen3_moe",
        ),
        ({}, "model_type None is of no known family"),
        ({"model_type": "qwen3"}, "num_hidden_layers is missing, a qwen3 needs it"),
        ({**QWEN3_30B, "head_dim": "128"}, "head_dim must be a whole number from 1, got '128'"),
        ({**QWEN3_30B, "num_experts": True}, "num_experts must be a whole number"),
        ({**QWEN3_30B, "num_hidden_layers": 10**7}, "must be at most 1,000"),
        ({**QWEN3_30B, "attention_bias": True}, "attention_bias is True, False is needed"),
        ({**QWEN3_30B, "mlp_only_layers": [1.5]}, "mlp_only_layers must be a list of layers"),
        (
            {**KIMI_K2, "first_k_dense_replace": 61},
            "first_k_dense_replace 61 and moe_layer_freq 1 of 61 layers leave none",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_contradictions(tmp_path: Path) -> None:
    path = written(tmp_path, QWEN3_30B)
    with pytest.raises(UsageError, match="contradicts --hf-config"):
        parse(["--dry-run", "--model", "tiny_qwen3", "--hf-config", str(path)])
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "extra",
    [
        {"mlp_bias": False},
        {"use_qk_norm": False},
        {"num_experts": 8},
        {"\x1b[31m": 1},
        {"layer_types": ["linear_attention"]},
    ],
)
def test_a_key_that_nothing_reads_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    dense = {key: value for key, value in QWEN3_30B.items() if "expert" not in key and "moe" not in key}
    plain = {key: value for key, value in dense.items() if key not in ("decoder_sparse_step", "mlp_only_layers")}
    read(written(tmp_path, {**plain, "model_type": "qwen3"}))
    read(written(tmp_path, {**plain, "model_type": "qwen3", **dict.fromkeys(extra)}))  # null asks for nothing
    with pytest.raises(UsageError, match=r"is known to have|layer_types has") as error:
        read(written(tmp_path, {**plain, "model_type": "qwen3", **extra}))
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"head_dim": 128}, "head_dim is 128, a deepseek_v3 needs qk_rope_head_dim = 64"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, a deepseek_v3 needs num_attention_heads = 64"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', 'noaux_tc' is needed"),
        ({"pruned_heads": {"1": [0]}}, "every layer is built with all heads"),
    ],
)
def test_a_key_of_other_weights_is_refused(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(written(tmp_path, {**KIMI_K2, **extra}))


@pytest.mark.parametrize(("frequency", "routed"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3])])
def test_moe_layer_freq_is_honoured(tmp_path: Path, frequency: int, routed: list[int]) -> None:
    model, _ = read(written(tmp_path, {**KIMI_K2, "num_hidden_layers": 6, "moe_layer_freq": frequency}))
    assert model.experts is not None
    assert [layer for layer, has_experts in enumerate(model.experts.layers) if has_experts] == routed


@given(models())
@settings(max_examples=20, deadline=None)
def test_what_transformers_writes_is_read(tmp_path_factory: pytest.TempPathFactory, shape: ModelShape) -> None:
    values = config_values(shape)
    saved = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    again, _ = read(written(tmp_path_factory.mktemp("hf"), saved))
    assert (again.num_layers, again.hidden_size, again.mla) == (shape.num_layers, shape.hidden_size, shape.mla)
    assert (again.experts is None) == (shape.experts is None)


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 256,
}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_the_flags_for_another_family_describe_its_weights(tmp_path: Path, kind: str) -> None:
    """The printed flags build as many weights as transformers' model has."""
    values = {**SMALL, "max_position_embeddings": 128, **OTHER_MODELS[kind]}
    with pytest.raises(UsageError, match=f"model_type '{kind}' is of no known family") as error:
        read(written(tmp_path, {**values, "model_type": kind}))
    _, _, flags = str(error.value).partition("to Megatron sides with ")
    shape = parse(["--dry-run", *shlex.split(flags)]).scenario.model
    assert shape is not None
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    alone = SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1))
    held = [math.prod(each.shape) for key, each in predict(shape, alone).tensors.items() if "expert_bias" not in key]
    assert sum(held) == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model_type": "qwen3_5_moe"},
            "projections of their own .*: describe the text model to Megatron sides with the",
        ),
        ({"model_type": "mistral"}, "num_hidden_layers must be a whole number from 1, got None"),
        (
            {"model_type": "mistral", **SMALL, "max_position_embeddings": 8, "mlp_bias": True},
            "has others than the flags",
        ),
        (
            {"model_type": "llama", **SMALL, "mlp_bias": True},
            "mlp_bias is True, False is needed: the family has no name",
        ),
        ({"model_type": ["x"]}, "of no known family, known are"),
    ],
)
def test_what_no_flags_describe_is_said(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(written(tmp_path, content))
