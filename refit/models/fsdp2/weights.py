"""Reads what a rank holds from each DTensor's own chunk list, as views of its local memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from refit.errors import ShardingError
from refit.models.weights import LocalShard, LocalWeights, joined
from refit.plan.box import Box, coalesce
from refit.predict.families.names import NamedModel, NamedTensor


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor's memory on this rank and the box of the tensor that it is."""

    box: Box
    data: torch.Tensor


def read_weights(model: torch.nn.Module, named: NamedModel) -> LocalWeights:
    """Every parameter and persistent buffer of `model`, under its logical keys.

    Raises ShardingError where the model and the family's table do not have the same tensors of the same shapes, and
    where a DTensor's chunks are not its local memory.
    """
    tensors = _tensors(model)
    expected = {block.prefix + tensor.name: tensor for block in named.blocks for tensor in block.tensors}
    _check_same(tensors, expected)
    shards: list[LocalShard] = []
    for block in named.blocks:
        for tensor in block.tensors:
            held = _held(block.prefix + tensor.name, tensors[block.prefix + tensor.name])
            if held is not None:
                shards += _local_shards(named, block.key_prefix, tensor, held)
    return LocalWeights(joined(shards))


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, each under its first name, and persistent buffers."""
    names = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {**dict(model.named_parameters()), **buffers}


def _check_same(tensors: dict[str, torch.Tensor], expected: dict[str, NamedTensor]) -> None:
    shapes = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    known = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    wrong = [
        f"{name} is {shapes.get(name, 'absent')} in the model and {known.get(name, 'absent')} in the table"
        for name in sorted(shapes.keys() | known.keys())
        if shapes.get(name) != known.get(name)
    ]
    if wrong:
        raise ShardingError(f"{len(wrong)} tensors of transformers are not those of the table: {'; '.join(wrong[:3])}")


def _held(name: str, tensor: torch.Tensor) -> _Held | None:
    """What this rank holds of a tensor, as its chunk list states it; None where that is nothing."""
    if not isinstance(tensor, DTensor):
        return _Held(Box.whole(tuple(tensor.shape)), tensor.detach())
    local = tensor._local_tensor.detach()
    stated: Any = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    chunks = (Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stated)
    boxes = coalesce(box for box in chunks if box.volume)
    if not boxes and not local.numel():
        return None
    if len(boxes) != 1 or boxes[0].extents != tuple(local.shape):
        raise ShardingError(f"{name}: {tuple(local.shape)} is held in one piece, its chunks are {boxes}")
    return _Held(boxes[0], local)


def _local_shards(named: NamedModel, key_prefix: str, tensor: NamedTensor, held: _Held) -> Iterator[LocalShard]:
    for part, logical in tensor.pieces_of(held.box):
        view = held.data[part.slices_within(held.box)].view(logical.box.extents)
        yield LocalShard(named.logical[key_prefix + logical.key], logical.box, held.data, view)
