"""Weights in the memory of a peer: where each shard lies there, and views of them once that memory is mapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec


@dataclass(frozen=True, slots=True)
class Place:
    """A shard in memory of its rank: its first element is at byte `offset` of region `region`.

    `strides` are in elements. A heap is one region; weights that stay where they are have one per storage.
    """

    tensor: TensorSpec
    box: Box
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]
    region: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which takes several times as long for frozen classes with slots, field by field. A peer gets the
        places of all weights."""
        tensor, box = self.tensor, self.box
        spec = (tensor.key, tensor.shape, tensor.dtype, tensor.stacked, tensor.padded)
        return _place, (spec, (box.offsets, box.extents), self.dtype, self.offset, self.strides, self.region)


def _place(spec: tuple[Any, ...], box: tuple[Any, ...], *others: Any) -> Place:
    return Place(TensorSpec(*spec), Box(*box), *others)


def place_of(shard: LocalShard, region: torch.Tensor, number: int = 0) -> Place:
    """The place of `shard`, which lies in `region` (uint8), the rank's region of that `number`."""
    view = shard.view
    return Place(shard.tensor, shard.box, view.dtype, view.data_ptr() - region.data_ptr(), view.stride(), number)


def mapped_weights(regions: Sequence[torch.Tensor], places: Iterable[Place]) -> LocalWeights:
    """The shards at `places`, as views of a peer's mapped `regions`, uint8 each."""
    return LocalWeights(_mapped_shard(regions[place.region], place) for place in places)


def all_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def strided(
    region: torch.Tensor, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """The tensor that begins at byte `offset` of `region`, uint8."""
    first = region[offset:]
    whole = first[: first.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return torch.as_strided(whole, shape, strides, whole.storage_offset())


def _mapped_shard(region: torch.Tensor, place: Place) -> LocalShard:
    view = strided(region, place.dtype, place.offset, place.box.extents, place.strides)
    return LocalShard(place.tensor, place.box, region, view)
