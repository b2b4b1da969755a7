"""MiniMax-M2: grouped-query attention with norms over all heads, experts in every layer, a bias in the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refit.config.shape import Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families import mixtral
from refit.predict.families.config_keys import GROUPED_QUERIES, LOCAL_EXPERTS, ROUTED, SIZES
from refit.predict.families.tables import (
    DENSE_MLP,
    EXPERT_BIAS_KEY,
    FUSED_EXPERTS,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    QUERY_KEY_NORMS,
    ROUTER,
    Family,
    Row,
)
from refit.predict.megatron import Split

NORMS_OVER_HEADS = tuple(replace(row, split=Split.COLUMN) for row in QUERY_KEY_NORMS)
FLOAT32_IN_VLLM = tuple(replace(row, float32_in_vllm=True) for row in ROUTER)


def layer_flags(content: Mapping[str, Any], _: int) -> dict[str, object]:
    """None: every layer has experts. Raises UsageError for shared ones, and for the layers of MiniMax-Text-01."""
    kinds = content.get("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != 1 for kind in kinds)):
        raise UsageError("attn_type_list has other layers than 1, full attention: no other is built")
    return {}


def expert_values(experts: Experts) -> dict[str, Any]:
    """No values beside the sizes. Raises UsageError where some layers have no experts."""
    if not all(experts.layers):
        layer = experts.layers.index(False)
        raise UsageError(
            f"a minimax_m2 has experts in every layer, here layer {layer} has none: give --moe-layer-freq 1"
        )
    return {}


def engine_values(shape: ModelShape) -> dict[str, Any]:
    """What vLLM's model reads: heads are rotated whole, as both libraries do here."""
    return {"rotary_dim": shape.kv_channels, "scoring_func": "sigmoid", "use_routing_bias": True}


MINIMAX_M2 = Family(
    "minimax_m2",
    fits=lambda shape: shape.mla is None and shape.experts is not None and shape.qk_norm_over_heads,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION, *NORMS_OVER_HEADS),
    dense=DENSE_MLP,
    routed=(*FLOAT32_IN_VLLM, Row("mlp.e_score_correction_bias", EXPERT_BIAS_KEY, buffer=True)),
    experts=FUSED_EXPERTS,
    single_experts=mixtral.SINGLE_EXPERTS,
    keys=(*SIZES, *GROUPED_QUERIES, ROUTED[0], LOCAL_EXPERTS),
    style={
        "qk-layernorm": True,
        "qk-norm-over-heads": True,
        "group-query-attention": True,
        "moe-router-enable-expert-bias": True,
    },
    layer_keys=("attn_type_list",),
    layer_flags=layer_flags,
    expert_values=expert_values,
    required={
        "use_qk_norm": (True, "the family has norms of queries and keys"),
        "qk_norm_type": ("per_layer", "its norms run over all heads"),
        "use_routing_bias": (True, "its routers have an expert bias"),
        "shared_intermediate_size": (0, "it has no shared experts"),
    },
    unweighted={
        "rotary_dim": (None,),
        "layernorm_full_attention_beta": (None, 1.0),
        "layernorm_linear_attention_beta": (None, 1.0),
        "layernorm_mlp_beta": (None, 1.0),
        "mlp_intermediate_size": (None,),
        "shared_moe_mode": (None, "sigmoid"),
    },
    class_name="MiniMaxM2",
    engine_values=engine_values,
    published={"mlp.": "block_sparse_moe."},
    misfit=mixtral.misfit,
)
