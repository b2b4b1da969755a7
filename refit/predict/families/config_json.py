"""A family's config.json: read as Megatron-LM's flags, and written from a ModelShape.

What changes no weight is fixed (`NUMERICS`), the same for both libraries, so that their forward passes agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.config.shape import NORM_EPSILON, ROTARY_BASE, Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families.tables import DEEPSEEK_V3, FAMILIES, QWEN3, QWEN3_MOE, Family, closest_family

FILE_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json, the flag with the same value and the attribute of ModelShape that holds it.

    Without an `optional` one the flag's default applies.
    """

    name: str
    flag: str
    attribute: str
    optional: bool = False


SIZES = (
    Key("num_hidden_layers", "num-layers", "num_layers"),
    Key("hidden_size", "hidden-size", "hidden_size"),
    Key("num_attention_heads", "num-attention-heads", "num_attention_heads"),
    Key("intermediate_size", "ffn-hidden-size", "ffn_hidden_size"),
    Key("vocab_size", "vocab-size", "vocab_size"),
    Key("max_position_embeddings", "max-position-embeddings", "max_position_embeddings", optional=True),
)
GROUPED_QUERIES = (
    Key("num_key_value_heads", "num-query-groups", "num_query_groups"),
    Key("head_dim", "kv-channels", "kv_channels"),
)
LATENT = (
    Key("q_lora_rank", "q-lora-rank", "mla.q_lora_rank", optional=True),
    Key("kv_lora_rank", "kv-lora-rank", "mla.kv_lora_rank"),
    Key("qk_nope_head_dim", "qk-head-dim", "mla.qk_head_dim"),
    Key("qk_rope_head_dim", "qk-pos-emb-head-dim", "mla.qk_pos_emb_head_dim"),
    Key("v_head_dim", "v-head-dim", "mla.v_head_dim"),
)
ROUTED = (
    Key("num_experts_per_tok", "moe-router-topk", "experts.topk"),
    Key("moe_intermediate_size", "moe-ffn-hidden-size", "experts.ffn_hidden_size"),
)
KEYS = {
    QWEN3: (*SIZES, *GROUPED_QUERIES),
    QWEN3_MOE: (*SIZES, *GROUPED_QUERIES, *ROUTED, Key("num_experts", "num-experts", "experts.num_experts")),
    DEEPSEEK_V3: (*SIZES, *LATENT, *ROUTED, Key("n_routed_experts", "num-experts", "experts.num_experts")),
}
STYLE: dict[str, object] = {
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable-bias-linear": True,
    "qk-layernorm": True,
    "make-vocab-size-divisible-by": 1,
}
"""Flags that every family has."""

STYLES: dict[Family, dict[str, object]] = {
    QWEN3: {"group-query-attention": True},
    QWEN3_MOE: {"group-query-attention": True},
    DEEPSEEK_V3: {"multi-latent-attention": True, "moe-router-enable-expert-bias": True},
}
NUMERICS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": NORM_EPSILON,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
}
"""Keys of config.json that both libraries' models are built with, whatever the model."""

REQUIRED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "only --swiglu is built"),
    "attention_bias": (False, "no family has a name for these biases"),
}
"""Keys with the one value that can be built, and why."""

BUILT_WITH: dict[str, tuple[Any, ...]] = {
    "rms_norm_eps": (NORM_EPSILON,),
    "rope_theta": (ROTARY_BASE,),
    "rope_scaling": (None,),
    "rope_parameters": (None, NUMERICS["rope_parameters"]),
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "routed_scaling_factor": (None, 1.0),
    "norm_topk_prob": (None, True),
    "use_sliding_window": (None, False),
}
"""Keys that change no weight, and the values that the forward pass of both sides is built with."""

OTHER_WEIGHTS = {
    "num_nextn_predict_layers": ((None, 0), "its layers are left out, --mtp-num-layers builds them in Megatron"),
    "quantization_config": ((None,), "weights have the dtype of the flags (--bf16)"),
}
"""Keys whose weights are built otherwise than config.json says: values that ask for nothing, and what is done."""


@dataclass(frozen=True, slots=True)
class ConfigJson:
    """A config.json as flags (a preset's mapping), and notes on what in it is not honoured."""

    path: Path
    flags: dict[str, object]
    notes: tuple[str, ...]


# --- From config.json to flags -----------------------------------------------------------------------------------


def read_config_json(path: Path) -> ConfigJson:
    """Read `path`, a config.json or the folder of one.

    Raises UsageError where it cannot be read, lacks a key, names another architecture or asks for weights that no
    family has. Values are checked as the flags that they become.
    """
    file = path / FILE_NAME if path.is_dir() else path
    content = _content(file)
    try:
        family = _family(content)
        flags = {**STYLE, **STYLES[family], **_sizes(family, content), **_layers(family, content)}
        for key, (value, reason) in REQUIRED.items():
            if content.get(key, value) != value:
                raise UsageError(f"{key} is {yaml_files.shortened(content[key])}, {value!r} is needed: {reason}")
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    if not content.get("tie_word_embeddings", False):
        flags["untie-embeddings-and-output-weights"] = True
    return ConfigJson(file, flags, tuple(f"{file}: {note}" for note in _notes(content)))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(yaml_files.read_text(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _family(content: Mapping[str, Any]) -> Family:
    given = content.get("model_type")
    for family in FAMILIES:
        if given in (family.model_type, *family.aliases):
            return family
    known = ", ".join(name for family in FAMILIES for name in (family.model_type, *family.aliases))
    raise UsageError(f"model_type {yaml_files.shortened(given)} is of no known family: known are {known}")


def _sizes(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    sizes: dict[str, object] = {}
    for key in KEYS[family]:
        value = content.get(key.name)
        if value is not None:
            sizes[key.flag] = _whole(key.name, value)
        elif not key.optional:
            raise UsageError(f"{key.name} is missing, a {family.model_type} needs it")
    return sizes


def _layers(family: Family, content: Mapping[str, Any]) -> dict[str, object]:
    """Flags of the shared experts, and of the layers that have routed ones."""
    if family is QWEN3:
        return {}
    num_layers = _whole("num_hidden_layers", content["num_hidden_layers"])
    if family is DEEPSEEK_V3:
        shared = _whole("n_shared_experts", content.get("n_shared_experts", 1))
        width = shared * _whole("moe_intermediate_size", content["moe_intermediate_size"])
        num_dense = _whole("first_k_dense_replace", content.get("first_k_dense_replace", 0), least=0)
        if num_dense >= num_layers:
            raise UsageError(f"first_k_dense_replace {num_dense} of {num_layers} layers leaves none with experts")
        return {
            "moe-shared-expert-intermediate-size": width,
            "moe-layer-freq": f"([0]*{num_dense}+[1]*{num_layers - num_dense})",
        }
    step = _whole("decoder_sparse_step", content.get("decoder_sparse_step", 1))
    dense = content.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise UsageError(f"mlp_only_layers must be a list of layers, got {yaml_files.shortened(dense)}")
    routed = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(num_layers)]
    return {"moe-layer-freq": f"{routed}"}


def _whole(name: str, value: object, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be a whole number from {least}, got {yaml_files.shortened(value)}")
    return value


def _notes(content: Mapping[str, Any]) -> list[str]:
    others = [
        f"{key} {yaml_files.shortened(content[key], 40)}"
        for key, values in BUILT_WITH.items()
        if key in content and content[key] not in values
    ]
    notes = [
        f"{key} is not honoured: {done}"
        for key, (neutral, done) in OTHER_WEIGHTS.items()
        if content.get(key) not in neutral
    ]
    if others:
        notes.append(f"not honoured, as no weight depends on it: {', '.join(others)}")
    return notes


# --- From a ModelShape to the values of config.json ---------------------------------------------------------------


def config_values(shape: ModelShape) -> dict[str, Any]:
    """The keys of config.json that describe `shape`, with `model_type`.

    Raises UsageError where the family's configuration cannot describe it.
    """
    family = closest_family(shape)
    if shape.position_embedding_type != "rope":
        raise UsageError(
            f"{family.model_type} of transformers has rotary position embeddings, the model has "
            f"{shape.position_embedding_type}: give --position-embedding-type rope"
        )
    values = {key.name: attrgetter(key.attribute)(shape) for key in KEYS[family]}
    values |= {**NUMERICS, "model_type": family.model_type, "tie_word_embeddings": shape.tied_embeddings}
    if shape.mla is not None:
        values["num_key_value_heads"] = shape.num_attention_heads  # as published ones have it, DeepSpeed reads it
    if shape.experts is not None:
        values |= _EXPERT_VALUES[family](shape.experts)
    return values


def _qwen3_moe_values(experts: Experts) -> dict[str, Any]:
    dense = [layer for layer, routed in enumerate(experts.layers) if not routed]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "norm_topk_prob": experts.topk > 1}


def _deepseek_v3_values(experts: Experts) -> dict[str, Any]:
    num_dense = experts.layers.index(True) if True in experts.layers else len(experts.layers)
    if not all(experts.layers[num_dense:]):
        raise UsageError(
            f"deepseek_v3 of transformers has its dense layers first, here layer {num_dense} has experts and layer "
            f"{num_dense + experts.layers[num_dense:].index(False)} has none: change --moe-layer-freq"
        )
    shared, rest = divmod(experts.shared_ffn_hidden_size or 0, experts.ffn_hidden_size)
    if rest:
        raise UsageError(
            f"deepseek_v3 of transformers has shared experts as wide as routed ones: "
            f"--moe-shared-expert-intermediate-size {experts.shared_ffn_hidden_size} is no multiple of "
            f"{experts.ffn_hidden_size}"
        )
    return {
        "first_k_dense_replace": num_dense,
        "n_shared_experts": shared,
        "norm_topk_prob": experts.topk > 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


_EXPERT_VALUES: dict[Family, Callable[[Experts], dict[str, Any]]] = {
    QWEN3_MOE: _qwen3_moe_values,
    DEEPSEEK_V3: _deepseek_v3_values,
}
