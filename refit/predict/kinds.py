"""The kind of a logical tensor, for reports."""

from __future__ import annotations

OTHER = "other"

_PARTS = (
    ("norm", "norms"),
    (".router.", "router"),
    (".shared_experts.", "shared experts"),
    (".experts.", "experts"),
    (".self_attention.", "attention"),
    (".mlp.", "dense MLP"),
    ("embedding.", "embedding"),
    ("output_layer.", "output layer"),
)
"""What a key has in it, and the kind: the first that fits. Norms come first, since they lie in all parts."""


def kind_of(key: str) -> str:
    """`experts` of `decoder.layers.3.mlp.experts.experts.linear_fc1.weight`."""
    return next((kind for part, kind in _PARTS if part in key), OTHER)


KINDS = (*dict.fromkeys(kind for _, kind in reversed(_PARTS)), OTHER)
"""All kinds, in the order in which they are listed."""
