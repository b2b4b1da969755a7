"""Which boxes of which tensors ranks hold: one rank (`RankSharding`), all ranks of a side (`Sharding`)."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refit.errors import ShardingError
from refit.plan.box import Box, coalesce
from refit.plan.box_array import BoxArray, IntArray

ITEMSIZE = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One global tensor of the model, independent of the ranks that hold it.

    `stacked`: each index of dim 0 is a tensor of its own in memory, as routed experts `[num_experts, ...]` are.
    `padded`: dim 0 may differ between the sides, as the vocabulary does, which is padded to suit the TP size.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    stacked: bool = False
    padded: bool = False

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def memory_boxes(self, box: Box) -> Iterator[Box]:
        """`box`, split so that each part lies within one tensor in memory: one part per index of a stacked dim 0."""
        if not self.stacked or box.extents[0] == 1:
            yield box
            return
        for index in range(box.offsets[0], box.ends[0]):
            yield box.narrow(0, index, index + 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one tensor that one rank holds: sorted, coalesced boxes. A gated fc1 has two, gate and up."""

    tensor: TensorSpec
    boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        return sum(box.volume for box in self.boxes) * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class RankSharding:
    """All shards of one rank, by tensor key."""

    shards: Mapping[str, Shard]

    @classmethod
    def of(cls, parts: Iterable[tuple[TensorSpec, Box]]) -> RankSharding:
        """Collect (tensor, box) parts. A tensor may have several; boxes that touch are merged.

        Raises ShardingError where two parts disagree about one tensor.
        """
        specs: dict[str, TensorSpec] = {}
        boxes: dict[str, list[Box]] = defaultdict(list)
        for tensor, box in parts:
            known = specs.setdefault(tensor.key, tensor)
            if known != tensor:
                raise ShardingError(f"{tensor.key} is stated twice, as {known} and as {tensor}")
            boxes[tensor.key].append(box)
        return cls({key: Shard(specs[key], coalesce(boxes[key])) for key in specs})

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards.values())

    def differences(self, other: RankSharding) -> list[str]:
        """One line per tensor that differs; empty where the two are equal."""
        lines = []
        for key in sorted(self.shards.keys() | other.shards.keys()):
            mine, theirs = self.shards.get(key), other.shards.get(key)
            if mine != theirs:
                lines.append(f"{key}: {_describe(mine)} != {_describe(theirs)}")
        return lines


def _describe(shard: Shard | None) -> str:
    if shard is None:
        return "absent"
    boxes = ", ".join(f"{box.offsets}+{box.extents}" for box in shard.boxes)
    flags = "".join(f" {name}" for name in ("stacked", "padded") if getattr(shard.tensor, name))
    return f"{shard.tensor.dtype}{list(shard.tensor.shape)}{flags} at {boxes}"


@dataclass(frozen=True, slots=True)
class ReplicatedShard:
    """A box of a tensor and the ranks that hold it, in the rank order of their side."""

    box: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holders:
    """Which ranks hold which boxes: box `box[i]` is on rank `rank[i]`, both `[num_held]`, in the order of the boxes."""

    box: IntArray
    rank: IntArray


@dataclass(frozen=True)
class TensorSharding:
    """How one tensor is sharded over the ranks of a side.

    Layers of one kind share one object: what is asked of it is then computed once.
    """

    shards: tuple[ReplicatedShard, ...]

    @cached_property
    def boxes(self) -> BoxArray:
        """The boxes of `shards`, in their order."""
        dims = len(self.shards[0].box.offsets) if self.shards else 0
        return BoxArray.of([shard.box for shard in self.shards], dims)

    @cached_property
    def holders(self) -> Holders:
        return holders_of([shard.ranks for shard in self.shards])

    @cached_property
    def kinds(self) -> tuple[IntArray, IntArray]:
        """Ranks that hold the same boxes are of one kind: the kind of each rank, and a rank of each kind.

        Shapes: `[1 + the highest holder]`, `[num_kinds]`. Kind 0 are ranks that hold nothing; its rank is -1.
        """
        boxes: dict[int, list[int]] = defaultdict(list)
        for box, shard in enumerate(self.shards):
            for rank in shard.ranks:
                boxes[rank].append(box)
        kinds = np.zeros(1 + max(boxes, default=0), np.int64)
        numbers: dict[tuple[int, ...], int] = {}
        representatives = [-1]
        for rank, held in boxes.items():
            kinds[rank] = numbers.setdefault(tuple(held), len(representatives))
            if kinds[rank] == len(representatives):
                representatives.append(rank)
        return kinds, np.array(representatives, np.int64)

    @classmethod
    def of(cls, boxes_by_rank: Iterable[tuple[int, Iterable[Box]]]) -> TensorSharding:
        ranks: dict[Box, list[int]] = defaultdict(list)
        for rank, boxes in boxes_by_rank:
            for box in boxes:
                ranks[box].append(rank)
        return cls(tuple(ReplicatedShard(box, tuple(holders)) for box, holders in ranks.items()))

    def boxes_of(self, rank: int) -> tuple[Box, ...]:
        held = self.holders.box[self.holders.rank == rank]
        return tuple(sorted(self.shards[index].box for index in held.tolist()))


def holders_of(ranks_by_box: Sequence[tuple[int, ...]]) -> Holders:
    """The holders of boxes, from the ranks of each."""
    counts = np.array([len(ranks) for ranks in ranks_by_box], np.int64)
    ranks = np.fromiter(itertools.chain.from_iterable(ranks_by_box), np.int64, int(counts.sum()))
    return Holders(np.repeat(np.arange(len(counts)), counts), ranks)


@dataclass(frozen=True)
class Sharding:
    """The sharding of every tensor of one side. `ranks` are the ranks of the side, in order."""

    ranks: tuple[int, ...]
    tensors: Mapping[str, TensorSpec]
    by_key: Mapping[str, TensorSharding]

    @classmethod
    def from_ranks(cls, by_rank: Mapping[int, RankSharding]) -> Sharding:
        """Combine the shardings of all ranks of a side, as gathered from live models.

        Raises ShardingError where two ranks disagree about one tensor.
        """
        tensors: dict[str, TensorSpec] = {}
        boxes: dict[str, list[tuple[int, tuple[Box, ...]]]] = defaultdict(list)
        for rank, held in by_rank.items():
            for key, shard in held.shards.items():
                known = tensors.setdefault(key, shard.tensor)
                if known != shard.tensor:
                    raise ShardingError(f"rank {rank} states {key} as {shard.tensor}, another rank as {known}")
                boxes[key].append((rank, shard.boxes))
        # Layers of one kind share one TensorSharding object: what is asked of it is then computed once.
        shared: dict[TensorSharding, TensorSharding] = {}
        by_key = {
            key: shared.setdefault(tensor_sharding, tensor_sharding)
            for key, tensor_sharding in ((k, TensorSharding.of(b)) for k, b in boxes.items())
        }
        return cls(tuple(by_rank), tensors, by_key)

    def of_rank(self, rank: int) -> RankSharding:
        """The shards of `rank`."""
        boxes_of = {id(tensor_sharding): tensor_sharding.boxes_of(rank) for tensor_sharding in self.distinct}
        held = ((key, boxes_of[id(tensor_sharding)]) for key, tensor_sharding in self.by_key.items())
        return RankSharding({key: Shard(self.tensors[key], boxes) for key, boxes in held if boxes})

    @cached_property
    def distinct(self) -> tuple[TensorSharding, ...]:
        """Every TensorSharding object of the side, once."""
        return tuple({id(tensor_sharding): tensor_sharding for tensor_sharding in self.by_key.values()}.values())

    @cached_property
    def bytes_per_rank(self) -> Mapping[int, int]:
        """Rank -> bytes of weights it holds."""
        itemsizes: dict[int, int] = defaultdict(int)
        for key, tensor_sharding in self.by_key.items():
            itemsizes[id(tensor_sharding)] += self.tensors[key].itemsize
        held = np.zeros(1 + max(self.ranks, default=0), np.int64)
        for tensor_sharding in self.distinct:
            holders = tensor_sharding.holders
            np.add.at(held, holders.rank, tensor_sharding.boxes.volumes[holders.box] * itemsizes[id(tensor_sharding)])
        return {rank: int(held[rank]) for rank in self.ranks}

    @property
    def num_parameters(self) -> int:
        """Elements of all global tensors, buffers included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())
