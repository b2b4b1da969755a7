"""vLLM's names of parameters: those of one version, and the other spellings of the same parameters.

A prediction has the names of `FOLLOWED`. 0.25 has the same; versions before the routed experts became a module of their
own have the experts' tensors directly below `mlp.experts`. The bias of a router is one tensor that two modules hold.
"""

from __future__ import annotations

import re

from refit.config.shape import ModelShape
from refit.config.side import SideSpec

FOLLOWED = "0.32"
"""The version of vLLM that the names follow."""

EXPERTS = "mlp.experts.routed_experts"
"""The module of a layer's routed experts, below the layer's prefix; of some families not below `mlp`."""

_SPELLINGS = (
    (re.compile(r"\b(mlp|block_sparse_moe)\.experts\.(?=w13_|w2_)"), r"\1.experts.routed_experts."),
    (re.compile(r"\bmlp\.experts\.(routed_experts\.)?(?=e_score_correction_bias$)"), "mlp.gate."),
    (re.compile(r"\bblock_sparse_moe\.experts\.(routed_experts\.)?(?=e_score_corr)"), "block_sparse_moe."),
)


def followed_name(name: str) -> str:
    """The name in `FOLLOWED` of the parameter that an engine calls `name`, in an older spelling or by an alias."""
    for spelling, now in _SPELLINGS:
        name = spelling.sub(now, name)
    return name


def is_experts(module: str) -> bool:
    """Whether this module of a layer holds its routed experts."""
    return module.endswith(EXPERTS.removeprefix("mlp"))


def note(shape: ModelShape, _: SideSpec) -> str | None:
    """Which version the names of a side follow; None for models whose names are the same in all."""
    if shape.experts is None:
        return None
    return f"parameters are named as in vLLM {FOLLOWED} ({EXPERTS}.w13_weight), older ones have mlp.experts.w13_weight"
