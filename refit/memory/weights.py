"""LocalWeights: the live shards of one side on this rank, and the views of any box of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from refit.memory.codec import Decoder, Encoder, Piece
from refit.memory.views import View, part_within
from refit.plan.box import Box, coalesce
from refit.plan.sharding import RankSharding, TensorSpec
from refit.predict.families.parts import Parts

Part = tuple[str, Box]
"""A box of the tensor of that key."""

Hook = Callable[[], None]
"""Called on the thread that copies, with the CUDA stream that copies as the current one."""


@dataclass(frozen=True, slots=True)
class LocalShard:
    """`box` of a global tensor in this rank's memory: `view`, of shape `box.extents`, onto the model's own storage.

    `owner` is the parameter or buffer that `view` is a part of. A model may give it new storage between refits;
    `LocalWeights.refresh` then derives the view again.
    """

    tensor: TensorSpec
    box: Box
    owner: torch.Tensor
    view: torch.Tensor


def joined(shards: Iterable[LocalShard]) -> list[LocalShard]:
    """Merge shards that together are a whole contiguous owner, such as gate and up of an unsharded gated fc1.

    Contiguous memory in several shards would be transferred in as many parts.
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


class LocalWeights:
    """All live shards of one side on this rank, addressed by tensor key and box."""

    is_pipelined = False
    """Whether the weights are made, or used, while others move: `before_reading` or `after_writing` has hooks."""

    def __init__(self, shards: Iterable[LocalShard]) -> None:
        self._shards: dict[str, list[LocalShard]] = defaultdict(list)
        self._owners: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._generation = 0
        self._hold(shards)

    def __iter__(self) -> Iterator[LocalShard]:
        for shards in self._shards.values():
            yield from shards

    @property
    def generation(self) -> int:
        """How often `refresh` has found new storage. Holders of views compare it to learn that theirs are stale."""
        return self._generation

    @property
    def device(self) -> torch.device:
        return next((shard.view.device for shard in self), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        return sum(shard.view.numel() * shard.view.element_size() for shard in self)

    @property
    def rank_sharding(self) -> RankSharding:
        """What this rank holds, without the memory."""
        return RankSharding.of((shard.tensor, shard.box) for shard in self)

    def parts(self, key: str, box: Box) -> list[LocalShard]:
        """Disjoint parts of shards that together are `box`, sorted by their offsets.

        Raises KeyError where this rank does not hold all of `box`.
        """
        found = []
        for shard in self._candidates(key, box):
            # Nearly always one shard has all: there may be thousands of boxes, and this is most of preparing.
            if shard.box.contains(box):
                return [LocalShard(shard.tensor, box, shard.owner, part_within(shard.view.detach(), shard.box, box))]
            part = box.intersect(shard.box)
            if part is not None:
                view = part_within(shard.view.detach(), shard.box, part)
                found.append(LocalShard(shard.tensor, part, shard.owner, view))
        if sum(part.box.volume for part in found) != box.volume:
            raise KeyError(f"{key}: {box} is not held here as a whole")
        return sorted(found, key=lambda part: part.box.offsets)

    def views(self, key: str, box: Box) -> list[View]:
        """The views of `parts`. Raises KeyError as it does."""
        return [View(part.box, part.view, part.owner) for part in self.parts(key, box)]

    def refresh(self) -> bool:
        """Derive views again from owners with new storage. Returns whether any owner had some since the last call."""
        addresses = addresses_of(self._owners)
        if addresses == self._addresses:
            return False
        before = {id(owner): address for owner, address in zip(self._owners, self._addresses, strict=True)}
        for key, shards in self._shards.items():
            self._shards[key] = [_rebound(shard, before[id(shard.owner)]) for shard in shards]
        self._index = self._index_stacked()
        self._addresses = addresses
        self._generation += 1
        return True

    def before_reading(self, parts: Iterable[Part]) -> Hook | None:
        """What to call before copies read these parts in a refit; None for nothing. Equal parts have one hook."""
        return None

    def after_writing(self, parts: Iterable[Part]) -> Hook | None:
        """What to call, once in a refit, after copies have written these parts; None for nothing."""
        return None

    def reaches(self, peer: int, theirs: LocalWeights) -> None:
        """What these weights send to `peer` can be written into `theirs`, that rank's own in memory mapped here.

        A transport calls it before it asks for views, and again where `theirs` have new storage. Weights that are made
        can be made there: what lies where it is sent to is not copied.
        """

    def encoder(self, pieces: Sequence[Piece]) -> Encoder:
        """What packs a message of these pieces, in place of copies. For weights whose wire has `max_bytes`."""
        raise AssertionError("these weights do not pack their messages")

    def decoder(self, pieces: Sequence[Piece]) -> Decoder:
        """What unpacks such a message into the weights."""
        raise AssertionError("these weights do not pack their messages")

    def _hold(self, shards: Iterable[LocalShard]) -> None:
        """Hold these too, in place of those with equal keys and boxes."""
        new: dict[str, list[LocalShard]] = defaultdict(list)
        for shard in shards:
            new[shard.tensor.key].append(shard)
        for key, added in new.items():
            boxes = {shard.box for shard in added}
            self._shards[key] = [*(shard for shard in self._shards[key] if shard.box not in boxes), *added]
        self._index = self._index_stacked()
        known = dict(zip(map(id, self._owners), self._addresses, strict=True))
        every = itertools.chain.from_iterable(self._shards.values())
        self._owners = list({id(shard.owner): shard.owner for shard in every}.values())
        # Of owners held before, what `refresh` has seen: it has yet to find what has moved since.
        self._addresses = [known.get(id(owner), owner.data_ptr()) for owner in self._owners]

    def _candidates(self, key: str, box: Box) -> list[LocalShard]:
        """Shards that may overlap `box`. The index avoids a search through the hundreds of experts of one key."""
        if box.offsets and box.extents[0] == 1 and (key, box.offsets[0]) in self._index:
            return self._index[key, box.offsets[0]]
        return self._shards[key]

    def _index_stacked(self) -> dict[tuple[str, int], list[LocalShard]]:
        index: dict[tuple[str, int], list[LocalShard]] = defaultdict(list)
        for shard in itertools.chain.from_iterable(self._shards.values()):
            if shard.tensor.stacked:
                for row in range(shard.box.offsets[0], shard.box.ends[0]):
                    index[shard.tensor.key, row].append(shard)
        return index


class Storages:
    """Where tensors have their memory, to learn whether one of them has been given other memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._addresses = addresses_of(self._tensors)

    def have_moved(self) -> bool:
        return addresses_of(self._tensors) != self._addresses


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Called in every refit for every parameter, so it does nothing but read one address of each."""
    return list(map(torch.Tensor.data_ptr, tensors))


def shards_in_parts(shards: Iterable[LocalShard], parts: Parts) -> Iterator[LocalShard]:
    """The same memory, with `parts` in place of their fused tensors."""
    for shard in shards:
        if shard.tensor.key not in parts:
            yield shard
        for part in parts.get(shard.tensor.key, ()):
            for piece in part.pieces_of(shard.box):
                yield LocalShard(part.tensor, piece.held, shard.owner, part_within(shard.view, shard.box, piece.box))


def new_shard(tensor: TensorSpec, box: Box, device: torch.device) -> LocalShard:
    """`box` of `tensor` in new memory."""
    data = torch.empty(box.extents, dtype=getattr(torch, tensor.dtype), device=device)
    # An alias, since a transport may give the owner other memory, and views follow it by their distance.
    return LocalShard(tensor, box, data, data.detach())


def assembled(weights: LocalWeights, key: str, box: Box) -> torch.Tensor:
    """`box` as one tensor: the weights themselves where they are in one view, else a copy."""
    views = weights.views(key, box)
    if len(views) == 1:
        return views[0].data
    whole = torch.empty(box.extents, dtype=views[0].data.dtype, device=views[0].data.device)
    for view in views:
        part_within(whole, box, view.box).copy_(view.data)
    return whole


def refresh_all(*memories: LocalWeights | None) -> None:
    """Refresh all. On models of many parameters this takes some tenths of a millisecond: once per refit is enough."""
    for memory in memories:
        if memory is not None:
            memory.refresh()


def generations(*memories: LocalWeights | None) -> tuple[int, ...]:
    """Their generations: equal to an earlier result exactly where `refresh` has changed no view since."""
    return tuple(memory.generation for memory in memories if memory is not None)


def _rebound(shard: LocalShard, old_address: int) -> LocalShard:
    """The same view at the same distance from the start of its owner's new storage.

    Valid as long as the owner keeps its shape and strides. A model that only swaps buffers does.
    """
    owner, view = shard.owner, shard.view
    distance = (view.data_ptr() - old_address) // view.element_size()
    offset = owner.storage_offset() + distance
    data = torch.as_strided(owner.detach(), view.shape, view.stride(), offset)
    return LocalShard(shard.tensor, shard.box, owner, data)
