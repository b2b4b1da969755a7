"""Models of config.json without a family here: the flags that describe the same weights to Megatron sides."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from typing import Any

from refit.errors import UsageError
from refit.predict.families.config_keys import STYLE

STYLES: dict[str, dict[str, object]] = {"mistral": {"group-query-attention": True}}
"""model_type -> flags that say what its layers are like, beside those of every family."""

QWEN3_5 = (
    "its delta nets have projections of their own and its sizes lie in text_config, beside a vision model: describe "
    "the text model to Megatron sides with the flags of --model qwen3_next_80b_a3b and its own sizes"
)
NOT_BUILT = dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), QWEN3_5)
"""model_type -> why it is no family here, and what to do."""

SIZES = {
    "num-layers": "num_hidden_layers",
    "hidden-size": "hidden_size",
    "num-attention-heads": "num_attention_heads",
    "ffn-hidden-size": "intermediate_size",
    "vocab-size": "vocab_size",
    "max-position-embeddings": "max_position_embeddings",
}
OPTIONAL = {"num-query-groups": "num_key_value_heads", "kv-channels": "head_dim"}


def remedy(content: Mapping[str, Any]) -> str:
    """What to do with a config.json whose model_type is of no family: the flags of the same model, or why none are."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in {*STYLES, *NOT_BUILT}:
        return "give such a file, or describe the model to Megatron sides with flags (--num-layers and others)"
    if kind in NOT_BUILT:
        return NOT_BUILT[kind]
    try:
        flags = {**STYLE, **STYLES[kind], **_sizes(kind, content)}
    except UsageError as error:
        return f"{error}, which flags that describe the model to Megatron sides need"
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items() if value]
    return f"describe the same weights to Megatron sides with {shlex.join(itertools.chain(*words))}"


def _sizes(kind: str, content: Mapping[str, Any]) -> dict[str, object]:
    """Flags of the sizes. Raises UsageError where a size is missing."""
    flags: dict[str, object] = {flag: _number(key, content) for flag, key in SIZES.items()}
    flags |= {flag: _number(key, content) for flag, key in OPTIONAL.items() if content.get(key)}
    if not content.get("tie_word_embeddings", False):
        flags["untie-embeddings-and-output-weights"] = True
    if content.get("attention_bias") or content.get("mlp_bias"):
        raise UsageError(f"a {kind} with biases in its linear layers has others than the flags build")
    return flags


def _number(key: str, content: Mapping[str, Any]) -> int:
    value = content.get(key)
    if type(value) is not int or value < 1:
        raise UsageError(f"{key} must be a whole number from 1, got {value!r:.40}")
    return value
