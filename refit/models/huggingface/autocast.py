"""torch.autocast for transformers models: float32 weights, matrix products in 16 bits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from refit.config.side import SideSpec

EXPERTS = "grouped_mm_autocast"
"""What `experts_forward` is called where transformers keeps the implementations of experts."""


def autocast(side: SideSpec, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Forward passes of `side` run in this context. Without autocast it changes nothing.

    Copies of weights in 16 bits are not cached: a pass uses each weight once, and FSDP2 frees it afterwards.
    """
    if side.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, side.autocast.value), cache_enabled=False)


def experts_forward(experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' `grouped_mm` in autocast's dtype, which that product itself does not follow.

    `hidden` `[tokens, hidden]`, `index` and `weights` `[tokens, topk]`: weighted outputs like `hidden`. Outside of
    autocast it is `grouped_mm` itself.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(experts, hidden, index, weights)
    dtype = torch.get_autocast_dtype(device)
    cast: Any = _CastExperts(experts, dtype)
    outputs = grouped_mm_experts_forward(cast, hidden.to(dtype), index, weights)
    return outputs.to(hidden.dtype)


class _CastExperts:
    """A module of experts as its own forward pass sees it, with weights in another dtype."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._experts, name)
        return found.to(self._dtype) if isinstance(found, torch.Tensor) else found


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
