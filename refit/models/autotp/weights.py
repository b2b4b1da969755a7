"""Reads what a rank holds of a tensor from the metadata that AutoTP puts on each parameter it splits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from refit.errors import ShardingError
from refit.models.huggingface.weights import Held, whole
from refit.plan.box import Box

METADATA = "ds_autotp_universal_checkpoint_meta"
"""Attribute of a parameter: how AutoTP has split it. Parameters that are whole have none."""


def metadata_of(tensor: torch.Tensor) -> dict[str, Any] | None:
    """AutoTP's metadata of a parameter; None for one that it has not split."""
    metadata: dict[str, Any] | None = getattr(tensor, METADATA, None)
    return metadata


def held_of(name: str, tensor: torch.Tensor, tp: dist.ProcessGroup) -> Held:
    """What this rank holds of a tensor. Raises ShardingError where the metadata does not say, or not of its memory."""
    metadata = metadata_of(tensor)
    if metadata is None or metadata["replicated"]:
        return whole(tensor)
    reason = metadata["conversion"]["unsupported_reason"]
    if reason or metadata["sub_param_sizes"] or metadata["partition_sizes"] is None:
        raise ShardingError(f"{name}: DeepSpeed does not state how it is split: {reason or 'it has sub-parameters'}")
    shape, dim, sizes = metadata["logical_shape"], metadata["partition_dim"], metadata["partition_sizes"]
    begin = sum(sizes[: tp.rank()])
    end = begin + sizes[tp.rank()]
    box = Box.whole(shape).narrow(dim, begin, end) if end > begin else None
    if tuple(tensor.shape) != tuple(end - begin if axis == dim else size for axis, size in enumerate(shape)):
        raise ShardingError(f"{name}: {tuple(tensor.shape)} is held, of {shape} DeepSpeed states {sizes} of dim {dim}")
    return Held(tuple(shape), box, tensor.detach())
