"""GLM-4.5 and 4.6: grouped-query attention with or without biases and norms, a shared expert, a bias in the router."""

from __future__ import annotations

from dataclasses import replace

from refit.predict.families.config_keys import OPTIONAL_GROUPED_QUERIES, ROUTED, SIZES, Key, Switch
from refit.predict.families.deepseek_v3 import expert_values, layer_flags
from refit.predict.families.tables import (
    DENSE_MLP,
    EXPERT_BIAS,
    FLOAT32_ROUTER,
    FUSED_EXPERTS,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    QUERY_KEY_NORMS,
    QUERY_KEY_VALUE_BIASES,
    SHARED_EXPERTS,
    SINGLE_EXPERTS,
    Family,
)

OPTIONAL = tuple(replace(row, optional=True) for row in (*QUERY_KEY_VALUE_BIASES, *QUERY_KEY_NORMS))
ROUTER = tuple(replace(row, float32_in_vllm=True) for row in FLOAT32_ROUTER)

GLM4_MOE = Family(
    "glm4_moe",
    fits=lambda shape: (
        shape.mla is None
        and shape.experts is not None
        and (shape.experts.expert_bias or (shape.experts.shared_ffn_hidden_size is not None and not shape.qk_layernorm))
    ),
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION, *OPTIONAL),
    dense=DENSE_MLP,
    routed=(*ROUTER, *EXPERT_BIAS, *SHARED_EXPERTS),
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    keys=(*SIZES, *OPTIONAL_GROUPED_QUERIES, *ROUTED, Key("n_routed_experts", "num-experts", "experts.num_experts")),
    style={"moe-router-enable-expert-bias": True},
    layer_keys=("first_k_dense_replace", "n_shared_experts"),
    layer_flags=layer_flags,
    expert_values=expert_values,
    switches=(
        Switch("attention_bias", "add-qkv-bias", "add_qkv_bias"),
        Switch("use_qk_norm", "qk-layernorm", "qk_layernorm"),
    ),
    numerics={"partial_rotary_factor": 1.0},
)
