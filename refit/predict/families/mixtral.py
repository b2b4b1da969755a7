"""Mixtral: grouped-query attention without norms, routed experts in every layer, none shared."""

from __future__ import annotations

from typing import Any

from refit.config.shape import Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families.config_keys import LOCAL_EXPERTS, OPTIONAL_GROUPED_QUERIES, ROUTED, SIZES
from refit.predict.families.tables import (
    DENSE_MLP,
    EXPERTS,
    FC1,
    FC2,
    FUSED_EXPERTS,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    ROUTER,
    Family,
    Part,
    Row,
)
from refit.predict.megatron import Split

SINGLE_EXPERTS = (
    Row("mlp.experts.{expert}.w1.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.GATE, routed=True),
    Row("mlp.experts.{expert}.w3.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.UP, routed=True),
    Row("mlp.experts.{expert}.w2.weight", f"{EXPERTS}.{FC2}", Split.ROW, routed=True),
)


def misfit(shape: ModelShape) -> str | None:
    """What to change: there is one key for the width of MLPs, and the only expert of a token would have weight 1."""
    experts = shape.experts
    if experts is None:
        return None
    if experts.ffn_hidden_size != shape.ffn_hidden_size:
        return f"give --ffn-hidden-size {experts.ffn_hidden_size}, that of the experts"
    return "give --moe-router-topk 2 or more" if experts.topk == 1 else None


def expert_values(experts: Experts) -> dict[str, Any]:
    """No values beside the sizes. Raises UsageError where some layers have no experts."""
    if not all(experts.layers):
        layer = experts.layers.index(False)
        raise UsageError(f"a mixtral has experts in every layer, here layer {layer} has none: give --moe-layer-freq 1")
    return {}


MIXTRAL = Family(
    "mixtral",
    fits=lambda shape: shape.mla is None and shape.experts is not None,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION),
    dense=DENSE_MLP,
    routed=ROUTER,
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    keys=(*SIZES, *OPTIONAL_GROUPED_QUERIES, ROUTED[0], LOCAL_EXPERTS),
    style={},
    expert_values=expert_values,
    published={"mlp.": "block_sparse_moe."},
    misfit=misfit,
)
