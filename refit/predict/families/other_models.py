"""Models of config.json without a family here: the flags that describe the same weights to Megatron sides."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from typing import Any

from refit.errors import UsageError
from refit.predict.families.config_keys import LATENT, STYLE

LLAMA: dict[str, object] = {"group-query-attention": True, "qk-layernorm": False}
LATENT_STYLE: dict[str, object] = {"multi-latent-attention": True}
STYLES: dict[str, dict[str, object]] = {
    "mistral": LLAMA,
    "glm4_moe_lite": {**LATENT_STYLE, "moe-router-enable-expert-bias": True},
}
"""model_type -> flags that say what its layers are like, beside those of every family."""

NOT_BUILT = {
    "gpt_oss": "its attention has sinks",
    "qwen3_next": "most of its layers have linear attention",
    "qwen3_5_moe": "most of its layers have linear attention",
    "minimax_m2": "its norms of queries and keys are as wide as all heads",
}
"""model_type -> why no flags describe it."""

SIZES = {
    "num-layers": "num_hidden_layers",
    "hidden-size": "hidden_size",
    "num-attention-heads": "num_attention_heads",
    "ffn-hidden-size": "intermediate_size",
    "vocab-size": "vocab_size",
    "max-position-embeddings": "max_position_embeddings",
    "moe-router-topk": "num_experts_per_tok",
}
OPTIONAL = {"num-query-groups": "num_key_value_heads", "kv-channels": "head_dim"}


def remedy(content: Mapping[str, Any]) -> str:
    """What to do with a config.json whose model_type is of no family: the flags of the same model, or why none are."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in {*STYLES, *NOT_BUILT}:
        return "give such a file, or describe the model to Megatron sides with flags (--num-layers and others)"
    if kind in NOT_BUILT:
        return f"flags cannot describe it either, as {NOT_BUILT[kind]}: bring the model with --model-provider"
    try:
        flags = {**STYLE, **STYLES[kind], **_sizes(kind, content)}
    except UsageError as error:
        return f"{error}, which flags that describe the model to Megatron sides need"
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items() if value]
    left_out = content.get("num_nextn_predict_layers")
    note = f" (and --mtp-num-layers {left_out} for its multi-token prediction)" if left_out else ""
    return f"describe the same weights to Megatron sides with {shlex.join(itertools.chain(*words))}{note}"


def _sizes(kind: str, content: Mapping[str, Any]) -> dict[str, object]:
    """Flags of the sizes. Raises UsageError where a size is missing."""
    latent = "kv_lora_rank" in content
    experts = "n_routed_experts" if content.get("n_routed_experts") else None
    names = {flag: key for flag, key in SIZES.items() if experts is not None or not flag.startswith("moe-")}
    flags: dict[str, object] = {flag: _number(key, content) for flag, key in names.items()}
    if latent:
        flags |= {key.flag: _number(key.name, content) for key in LATENT if content.get(key.name) or not key.optional}
    else:
        flags |= {flag: _number(key, content) for flag, key in OPTIONAL.items() if content.get(key)}
    if not content.get("tie_word_embeddings", False):
        flags["untie-embeddings-and-output-weights"] = True
    if latent:
        flags["qk-layernorm"] = True
    if content.get("attention_bias") or content.get("mlp_bias"):
        raise UsageError(f"a {kind} with biases in its linear layers has others than the flags build")
    if experts is not None:
        flags |= {"num-experts": _number(experts, content), **_expert_layers(content)}
    return flags


def _expert_layers(content: Mapping[str, Any]) -> dict[str, object]:
    width = _number("moe_intermediate_size" if "moe_intermediate_size" in content else "intermediate_size", content)
    flags: dict[str, object] = {"moe-ffn-hidden-size": width}
    if content.get("n_shared_experts"):
        flags["moe-shared-expert-intermediate-size"] = _number("n_shared_experts", content) * width
    num_layers, types = _number("num_hidden_layers", content), content.get("mlp_layer_types")
    if isinstance(types, list):
        num_dense = types.count("dense")
    else:
        num_dense = _number("first_k_dense_replace", content) if content.get("first_k_dense_replace") else 0
    if num_dense:
        flags["moe-layer-freq"] = f"([0]*{num_dense}+[1]*{num_layers - num_dense})"
    return flags


def _number(key: str, content: Mapping[str, Any]) -> int:
    value = content.get(key)
    if type(value) is not int or value < 1:
        raise UsageError(f"{key} must be a whole number from 1, got {value!r:.40}")
    return value
