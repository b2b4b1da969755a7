"""An RMS norm over what several ranks hold together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from refit.config.shape import NORM_EPSILON


def norm_of_parts(part: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`part` `[..., width]`, normalised over the parts of all ranks of `group`, all equally wide; `weight` `[width]` is
    this rank's.

    Parts that several ranks hold alike count equally often. Collective: every rank of `group`, also in the backward
    pass.
    """
    squares: torch.Tensor = _Summed.apply(part.float().pow(2).sum(-1, keepdim=True), group)  # type: ignore[no-untyped-call]
    mean = squares / (part.size(-1) * group.size())
    return weight * (part.float() * torch.rsqrt(mean + NORM_EPSILON)).to(part.dtype)


class _Summed(torch.autograd.Function):
    """The sum over a group; so is its gradient, since every rank goes on with the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _summed(gradients[0], ctx.group), None


def _summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
