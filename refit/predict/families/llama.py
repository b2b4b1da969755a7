"""Llama 2 and 3: dense, grouped-query attention without norms or biases."""

from __future__ import annotations

from refit.config.shape import ModelShape
from refit.predict.families.config_keys import OPTIONAL_GROUPED_QUERIES, SIZES
from refit.predict.families.tables import DENSE_MLP, GROUPED_QUERY_ATTENTION, MODEL, NORMS, Family


def divided_heads(shape: ModelShape) -> str | None:
    """What to change where the hidden size is no multiple of the heads, which configurations of transformers want."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    return f"give --hidden-size a multiple of {heads} heads, not {hidden}" if hidden % heads else None


LLAMA = Family(
    "llama",
    fits=lambda shape: shape.mla is None and shape.experts is None,
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION),
    dense=DENSE_MLP,
    keys=(*SIZES, *OPTIONAL_GROUPED_QUERIES),
    style={},
    required={"mlp_bias": (False, "the family has no name for these biases")},
    misfit=divided_heads,
)
