"""GLM-4.7-Flash: as DeepSeek-V3, with a number of heads that does not divide the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refit.config import yaml_files
from refit.config.shape import Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families import deepseek_v3
from refit.predict.families.tables import EXPERT_BIAS, FLOAT32_ROUTER, SHARED_EXPERTS

V3 = deepseek_v3.DEEPSEEK_V3
ROUTER = tuple(replace(row, float32_in_vllm=True) for row in FLOAT32_ROUTER)
KINDS = {"dense": 0, "sparse": 1}


def layer_flags(content: Mapping[str, Any], num_layers: int) -> dict[str, object]:
    """As DeepSeek-V3's, or from `mlp_layer_types`, which transformers writes. Without either, the first is dense."""
    flags = deepseek_v3.layer_flags({"first_k_dense_replace": min(1, num_layers - 1), **content}, num_layers)
    types = content.get("mlp_layer_types")
    if types is None:
        return flags
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in KINDS for kind in types):
        raise UsageError(
            f"mlp_layer_types must list {num_layers} layers as dense or sparse, got {yaml_files.shortened(types)}"
        )
    if "sparse" not in types:
        raise UsageError(f"mlp_layer_types of {num_layers} layers leaves none with experts: name one sparse")
    return {**flags, "moe-layer-freq": f"{[KINDS[kind] for kind in types]}"}


def expert_values(experts: Experts) -> dict[str, Any]:
    """Their values in config.json, beside the sizes. Raises UsageError as DeepSeek-V3's."""
    types = ["sparse" if routed else "dense" for routed in experts.layers]
    return {**deepseek_v3.expert_values(experts), "mlp_layer_types": types}


def fits(shape: ModelShape) -> bool:
    """Whether it has DeepSeek-V3's tensors, and heads that the models of that name do not have."""
    bias = shape.experts is not None and shape.experts.expert_bias
    return shape.mla is not None and bias and shape.hidden_size % shape.num_attention_heads > 0


GLM4_MOE_LITE = replace(
    V3,
    model_type="glm4_moe_lite",
    aliases=(),
    fits=fits,
    routed=(*ROUTER, *EXPERT_BIAS, *SHARED_EXPERTS),
    layer_keys=(*V3.layer_keys, "mlp_layer_types"),
    layer_flags=layer_flags,
    expert_values=expert_values,
)
