"""Qwen3, dense: grouped-query attention with norms, gated MLPs."""

from __future__ import annotations

from refit.predict.families.config_keys import GROUPED_QUERIES, SIZES
from refit.predict.families.tables import DENSE_MLP, GROUPED_QUERY_ATTENTION, MODEL, NORMS, QUERY_KEY_NORMS, Family

QWEN3 = Family(
    "qwen3",
    fits=lambda shape: shape.mla is None and shape.experts is None and shape.qk_layernorm,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION, *QUERY_KEY_NORMS),
    dense=DENSE_MLP,
    keys=(*SIZES, *GROUPED_QUERIES),
    style={"qk-layernorm": True, "group-query-attention": True},
)
