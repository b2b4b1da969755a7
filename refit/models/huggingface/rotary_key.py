"""Sums the gradient of latent attention's rotary key over tensor parallelism.

The key is one for all heads. Every rank of a TP group computes it whole and uses it for its own heads, so that each has
a part of its gradient. Latent states have none such: the projections that are split sum their inputs' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

PROJECTION = "kv_a_proj_with_mqa"
"""The projection whose last columns are the rotary key."""


def sum_rotary_key_gradients(model: Any, group: dist.ProcessGroup) -> None:
    """Sum them over `group` from now on. Models without latent attention stay as they are."""
    if group.size() == 1:
        return
    for name, module in model.named_modules():
        if name.endswith(PROJECTION):
            module.register_forward_hook(_summing(model.config.qk_rope_head_dim, group))


def _summing(width: int, group: dist.ProcessGroup) -> Any:
    def mark(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        latent, key = torch.tensor_split(output, (-width,), dim=-1)
        return torch.cat((latent, _Summed.apply(key, group)), dim=-1)  # type: ignore[no-untyped-call]

    return mark


class _Summed(torch.autograd.Function):
    """Passes a tensor on, and sums its gradient over a group."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None
