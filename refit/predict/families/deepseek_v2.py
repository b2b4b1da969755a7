"""DeepSeek-V2: latent attention, shared experts, routed ones weighed by a softmax over all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refit.config.shape import Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families import deepseek_v3
from refit.predict.families.llama import divided_heads
from refit.predict.families.tables import FLOAT32_ROUTER, SHARED_EXPERTS, Family

V3 = deepseek_v3.DEEPSEEK_V3


def layer_flags(content: Mapping[str, Any], num_layers: int) -> dict[str, object]:
    """As DeepSeek-V3's. Raises UsageError also for a router with an expert bias, which this family has no name for."""
    if content.get("topk_method") == "noaux_tc":
        raise UsageError("topk_method is 'noaux_tc', a router with an expert bias: give model_type deepseek_v3")
    return deepseek_v3.layer_flags(content, num_layers)


def expert_values(experts: Experts) -> dict[str, Any]:
    """Their values in config.json, beside the sizes. Raises UsageError as DeepSeek-V3's."""
    return {**deepseek_v3.expert_values(experts), "norm_topk_prob": False, "topk_method": "greedy"}


def fits(shape: ModelShape) -> bool:
    return shape.mla is not None and shape.experts is not None and not shape.experts.expert_bias


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    fits=fits,
    model=V3.model,
    layer=V3.layer,
    dense=V3.dense,
    routed=(*FLOAT32_ROUTER, *SHARED_EXPERTS),
    experts=V3.experts,
    single_experts=V3.single_experts,
    keys=V3.keys,
    style={"qk-layernorm": True, "multi-latent-attention": True},
    layer_keys=V3.layer_keys,
    layer_flags=layer_flags,
    expert_values=expert_values,
    derived=V3.derived,
    required={"mlp_bias": (False, "the family has no name for these biases")},
    unweighted={"topk_method": (None, "greedy"), "scoring_func": (None, "softmax"), "norm_topk_prob": (None, False)},
    misfit=divided_heads,
)
