"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases of queries, keys and values."""

from __future__ import annotations

from refit.config.shape import ModelShape
from refit.predict.families.config_keys import OPTIONAL_GROUPED_QUERIES, SIZES
from refit.predict.families.tables import (
    DENSE_MLP,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    QUERY_KEY_VALUE_BIASES,
    Family,
)


def equal_heads(shape: ModelShape) -> str | None:
    """What to change where heads are not hidden size / heads wide: vLLM's Qwen2 knows no other width."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if shape.kv_channels * heads == hidden:
        return None
    return f"give --kv-channels and --num-attention-heads whose product is the hidden size {hidden}"


QWEN2 = Family(
    "qwen2",
    fits=lambda shape: shape.mla is None and shape.experts is None and shape.add_qkv_bias,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION, *QUERY_KEY_VALUE_BIASES),
    dense=DENSE_MLP,
    keys=(*SIZES, OPTIONAL_GROUPED_QUERIES[0]),
    style={"add-qkv-bias": True},
    misfit=equal_heads,
)
