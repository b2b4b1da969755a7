"""LocalWeights: where a rank's shards lie in live memory, and the views that any box of them has there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from refit.plan.box import Box, coalesce
from refit.plan.sharding import TensorSpec


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One tensor in memory: `box` of the global tensor, `view` of shape `box.extents` onto the model's own storage.

    `owner` is the parameter or buffer that `view` looks into. A model may give it new storage between refits, so views
    are derived from it anew (`LocalWeights.refresh`).
    """

    tensor: TensorSpec
    box: Box
    owner: torch.Tensor
    view: torch.Tensor


def joined(shards: Iterable[LocalShard]) -> list[LocalShard]:
    """Make one shard of those that together are a whole owner: gate and up, stated apart, where nothing cuts them.

    What is one run of memory should be seen as one, or it would be moved in parts.
    """
    groups: dict[tuple[str, int], list[LocalShard]] = defaultdict(list)
    for shard in shards:
        groups[shard.tensor.key, id(shard.owner)].append(shard)
    return [shard for group in groups.values() for shard in _joined_group(group)]


def _joined_group(group: list[LocalShard]) -> list[LocalShard]:
    first, boxes = group[0], coalesce(shard.box for shard in group)
    owner = first.owner
    if len(group) == 1 or len(boxes) > 1 or boxes[0].volume != owner.numel() or not owner.is_contiguous():
        return group
    whole = owner.detach().view(boxes[0].extents)
    parts = (whole[shard.box.slices_within(boxes[0])] for shard in group)
    same = all(
        part.data_ptr() == shard.view.data_ptr() and part.is_contiguous() and shard.view.is_contiguous()
        for part, shard in zip(parts, group, strict=True)
    )
    return [LocalShard(first.tensor, boxes[0], owner, whole)] if same else group


@dataclass(frozen=True, slots=True)
class View:
    """The part `box` of a tensor, contiguous or not, in this rank's memory; `data` has shape `box.extents`."""

    box: Box
    data: torch.Tensor


class LocalWeights:
    """All live shards of one model on this rank, addressed by tensor key and box."""

    def __init__(self, shards: Iterable[LocalShard]) -> None:
        self._shards: dict[str, list[LocalShard]] = defaultdict(list)
        for shard in shards:
            self._shards[shard.tensor.key].append(shard)
        self._index = self._index_stacked()
        self._owners = list({id(shard.owner): shard.owner for shard in self}.values())
        self._addresses = self._current_addresses()
        self.generation = 0
        """How often storage was found moved. Whoever keeps views compares it: `refresh` tells only the first who
        asks."""

    def __iter__(self) -> Iterator[LocalShard]:
        for shards in self._shards.values():
            yield from shards

    @property
    def device(self) -> torch.device:
        return next((shard.view.device for shard in self), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        return sum(shard.view.numel() * shard.view.element_size() for shard in self)

    def views(self, key: str, box: Box) -> list[View]:
        """The live views that make up `box`, disjoint and complete, in order of their offsets.

        Raises KeyError where this rank does not hold all of it.
        """
        found = []
        for shard in self._candidates(key, box):
            part = box.intersect(shard.box)
            if part is not None:
                data = shard.view.detach()
                found.append(View(part, data if part == shard.box else data[part.slices_within(shard.box)]))
        if sum(view.box.volume for view in found) != box.volume:
            raise KeyError(f"{key}: {box} is not held here as a whole")
        return sorted(found, key=lambda view: view.box.offsets)

    def refresh(self) -> bool:
        """Follow owners whose storage has moved since the last call; True where any has."""
        addresses = self._current_addresses()
        if addresses == self._addresses:
            return False
        before = {id(owner): address for owner, address in zip(self._owners, self._addresses, strict=True)}
        for key, shards in self._shards.items():
            self._shards[key] = [_rebound(shard, before[id(shard.owner)]) for shard in shards]
        self._index = self._index_stacked()
        self._addresses = addresses
        self.generation += 1
        return True

    def _candidates(self, key: str, box: Box) -> list[LocalShard]:
        """Shards that may overlap `box`: a rank holds hundreds of experts under one key, of which a box needs one."""
        if box.offsets and box.extents[0] == 1 and (key, box.offsets[0]) in self._index:
            return self._index[key, box.offsets[0]]
        return self._shards[key]

    def _index_stacked(self) -> dict[tuple[str, int], list[LocalShard]]:
        index: dict[tuple[str, int], list[LocalShard]] = defaultdict(list)
        for shard in self:
            if shard.tensor.stacked:
                for row in range(shard.box.offsets[0], shard.box.ends[0]):
                    index[shard.tensor.key, row].append(shard)
        return index

    def _current_addresses(self) -> list[int]:
        """Part of every refit's time, so nothing but the look at each owner."""
        return [owner.data_ptr() for owner in self._owners]


def generations(*memories: LocalWeights | None) -> tuple[int, ...]:
    """Refresh all; equal to an earlier answer exactly where no view has moved since."""
    present = [memory for memory in memories if memory is not None]
    for memory in present:
        memory.refresh()
    return tuple(memory.generation for memory in present)


def _rebound(shard: LocalShard, old_address: int) -> LocalShard:
    """The same view at the same distance from its owner's start, wherever that is now.

    Valid as long as the owner keeps its shape and strides, which a model does that only swaps buffers.
    """
    owner, view = shard.owner, shard.view
    distance = (view.data_ptr() - old_address) // view.element_size()
    offset = owner.storage_offset() + distance
    data = torch.as_strided(owner.detach(), view.shape, view.stride(), offset)
    return LocalShard(shard.tensor, shard.box, owner, data)
