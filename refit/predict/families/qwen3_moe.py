"""Qwen3 with routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refit.config import yaml_files
from refit.config.shape import Experts
from refit.errors import UsageError
from refit.predict.families.config_keys import EXPERTS, GROUPED_QUERIES, ROUTED, SIZES, whole
from refit.predict.families.tables import (
    DENSE_MLP,
    FUSED_EXPERTS,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    QUERY_KEY_NORMS,
    ROUTER,
    SINGLE_EXPERTS,
    Family,
)


def layer_flags(content: Mapping[str, Any], num_layers: int) -> dict[str, object]:
    """Layers with routed experts: every so many, but for some that are named."""
    step = whole("decoder_sparse_step", content.get("decoder_sparse_step", 1))
    dense = content.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise UsageError(f"mlp_only_layers must be a list of layers, got {yaml_files.shortened(dense)}")
    routed = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(num_layers)]
    return {"moe-layer-freq": f"{routed}"}


def expert_values(experts: Experts) -> dict[str, Any]:
    """Their values in config.json, beside the sizes."""
    dense = [layer for layer, routed in enumerate(experts.layers) if not routed]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1, "norm_topk_prob": experts.topk > 1}


QWEN3_MOE = Family(
    "qwen3_moe",
    fits=lambda shape: shape.mla is None and shape.experts is not None and shape.qk_layernorm,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION, *QUERY_KEY_NORMS),
    dense=DENSE_MLP,
    routed=ROUTER,
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    keys=(*SIZES, *GROUPED_QUERIES, *ROUTED, EXPERTS),
    style={"qk-layernorm": True, "group-query-attention": True},
    layer_keys=("decoder_sparse_step", "mlp_only_layers"),
    layer_flags=layer_flags,
    expert_values=expert_values,
)
