"""Reads what a rank holds of a transformers model, as views of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from refit.errors import ShardingError
from refit.memory.views import in_order
from refit.memory.weights import LocalShard, LocalWeights, joined
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.predict.families.names import NamedModel, NamedTensor


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of `shape` and its memory on this rank, which is the `box` of it; None for an empty one."""

    shape: tuple[int, ...]
    box: Box | None
    data: torch.Tensor


def read_weights(
    model: torch.nn.Module, named: NamedModel, held_of: Callable[[str, torch.Tensor], Held]
) -> LocalWeights:
    """Every parameter and persistent buffer of `model`, under its logical keys.

    `held_of` asks the library that has split a tensor, given its name, what this rank holds of it. Dtypes are the
    tensors' own, whatever `named` states. Raises ShardingError as `held_of` does, and where the model and the family's
    table do not have the same tensors of the same shapes.
    """
    held = {name: held_of(name, tensor) for name, tensor in _tensors(model).items()}
    expected = {block.prefix + tensor.name: tensor for block in named.blocks for tensor in block.tensors}
    _check_same(held, expected)
    shards: list[LocalShard] = []
    for block in named.blocks:
        for tensor in block.tensors:
            shards += _local_shards(named, block.key_prefix, tensor, held[block.prefix + tensor.name])
    return LocalWeights(joined(shards))


def whole(tensor: torch.Tensor) -> Held:
    """A tensor that is whole on every rank."""
    return Held(tuple(tensor.shape), Box.whole(tuple(tensor.shape)), tensor.detach())


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, each under its first name, and persistent buffers."""
    names = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {**dict(model.named_parameters()), **buffers}


def _check_same(held: Mapping[str, Held], expected: Mapping[str, NamedTensor]) -> None:
    shapes = {name: part.shape for name, part in held.items()}
    known = {name: tensor.stored or tensor.shape for name, tensor in expected.items()}
    wrong = [
        f"{name} is {shapes.get(name, 'absent')} in the model and {known.get(name, 'absent')} in the table"
        for name in sorted(shapes.keys() | known.keys())
        if shapes.get(name) != known.get(name)
    ]
    if wrong:
        raise ShardingError(f"{len(wrong)} tensors of transformers are not those of the table: {'; '.join(wrong[:3])}")


def _local_shards(named: NamedModel, key_prefix: str, tensor: NamedTensor, held: Held) -> Iterator[LocalShard]:
    if held.box is None:
        return
    box = held.box
    if tensor.stored is not None:  # only experts lie so, which are split along dim 0
        box = Box((box.offsets[0], *(0 for _ in tensor.shape[1:])), (box.extents[0], *tensor.shape[1:]))
    data = held.data.view(box.extents)
    for part, logical in tensor.pieces_of(box):
        view = in_order(data[part.slices_within(box)], logical.axes).view(logical.box.extents)
        yield LocalShard(_with_dtype(named.logical[key_prefix + logical.key], view), logical.box, held.data, view)


def _with_dtype(stated: TensorSpec, held: torch.Tensor) -> TensorSpec:
    dtype = str(held.dtype).removeprefix("torch.")
    return stated if stated.dtype == dtype else replace(stated, dtype=dtype)
