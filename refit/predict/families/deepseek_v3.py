"""DeepSeek-V3 and Kimi K2: latent attention, shared experts, routed ones with a bias in the router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refit.config.shape import Experts
from refit.errors import UsageError
from refit.predict.families.config_keys import LATENT, ROUTED, SIZES, Key, whole
from refit.predict.families.tables import (
    DENSE_MLP,
    EXPERT_BIAS,
    FLOAT32_ROUTER,
    FUSED_EXPERTS,
    LATENT_ATTENTION,
    MODEL,
    NORMS,
    SHARED_EXPERTS,
    SINGLE_EXPERTS,
    Family,
)


def layer_flags(content: Mapping[str, Any], num_layers: int) -> dict[str, object]:
    """The width of the shared experts, and the layers with routed ones: every so many behind the dense ones."""
    shared = whole("n_shared_experts", content.get("n_shared_experts", 1))
    width = shared * whole("moe_intermediate_size", content["moe_intermediate_size"])
    num_dense = whole("first_k_dense_replace", content.get("first_k_dense_replace", 0), least=0)
    step = whole("moe_layer_freq", content.get("moe_layer_freq", 1))
    # As vLLM and DeepSeek's own code have it. transformers has no such key.
    routed = [int(layer >= num_dense and layer % step == 0) for layer in range(num_layers)]
    if not any(routed):
        raise UsageError(
            f"first_k_dense_replace {num_dense} and moe_layer_freq {step} of {num_layers} layers leave none with "
            "experts"
        )
    return {"moe-shared-expert-intermediate-size": width, "moe-layer-freq": f"{routed}"}


def expert_values(experts: Experts) -> dict[str, Any]:
    """Their values in config.json, beside the sizes. Raises UsageError where it has none for these layers."""
    num_dense = experts.layers.index(True) if True in experts.layers else len(experts.layers)
    if not all(experts.layers[num_dense:]):
        raise UsageError(
            f"such a model of transformers has its dense layers first, here layer {num_dense} has experts and layer "
            f"{num_dense + experts.layers[num_dense:].index(False)} has none: change --moe-layer-freq"
        )
    shared, rest = divmod(experts.shared_ffn_hidden_size or 0, experts.ffn_hidden_size)
    if rest:
        raise UsageError(
            f"such a model of transformers has shared experts as wide as routed ones: "
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


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    fits=lambda shape: shape.mla is not None,
    model=MODEL,
    layer=(*NORMS, *LATENT_ATTENTION),
    dense=DENSE_MLP,
    routed=(*FLOAT32_ROUTER, *EXPERT_BIAS, *SHARED_EXPERTS),
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    aliases=("kimi_k2",),
    keys=(*SIZES, *LATENT, *ROUTED, Key("n_routed_experts", "num-experts", "experts.num_experts")),
    style={"qk-layernorm": True, "multi-latent-attention": True, "moe-router-enable-expert-bias": True},
    layer_keys=("first_k_dense_replace", "moe_layer_freq", "n_shared_experts"),
    layer_flags=layer_flags,
    expert_values=expert_values,
    derived={
        "head_dim": ("qk_rope_head_dim",),
        "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
        "num_key_value_heads": ("num_attention_heads",),
    },
)
