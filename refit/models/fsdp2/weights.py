"""Reads what a rank holds of a tensor from the DTensor's own chunk list."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from refit.errors import ShardingError
from refit.models.huggingface.weights import Held, whole
from refit.plan.box import Box, coalesce


def held_of(name: str, tensor: torch.Tensor) -> Held:
    """What this rank holds of a tensor. Raises ShardingError where a DTensor's chunks are not its local memory."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    shape, local = tuple(tensor.shape), tensor._local_tensor.detach()
    stated: Any = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    chunks = (Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stated)
    boxes = coalesce(box for box in chunks if box.volume)
    if not boxes and not local.numel():
        return Held(shape, None, local)
    if len(boxes) != 1 or boxes[0].extents != tuple(local.shape):
        raise ShardingError(f"{name}: {tuple(local.shape)} is held in one piece, its chunks are {boxes}")
    return Held(shape, boxes[0], local)
