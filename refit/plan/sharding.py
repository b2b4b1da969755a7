"""Who holds what: the shards of one rank (`RankSharding`) and of all ranks of a side (`Sharding`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from refit.errors import ShardingError
from refit.plan.box import Box, coalesce

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
}
"""Bytes of one element, by the name torch gives the dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One global tensor of the model, whichever ranks hold it.

    `stacked` is True where the first dim numbers separate tensors in memory: routed experts, `[num_experts, ...]`.
    `padded` is True where the first dim may be longer on one side than on the other (the vocabulary, padded per TP).
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


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of one tensor: coalesced boxes, sorted. Gated fc1 gives two (gate, up)."""

    tensor: TensorSpec
    boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        return sum(box.volume for box in self.boxes) * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class RankSharding:
    """Everything one rank holds, by tensor key."""

    shards: Mapping[str, Shard]

    @classmethod
    def of(cls, parts: Iterable[tuple[TensorSpec, Box]]) -> RankSharding:
        """Collect (tensor, box) parts, several per tensor allowed; touching boxes are merged.

        Raises InventoryError where two parts state one tensor differently.
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
        """One line per tensor on which the two disagree; empty where they are equal."""
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
    """Ranks that hold the same box of a tensor: replicas of one another, in rank order of their side."""

    box: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSharding:
    """How one tensor lies over the ranks of a side. Equal for every layer of a kind, so planners memoise on it."""

    shards: tuple[ReplicatedShard, ...]

    @classmethod
    def of(cls, boxes_by_rank: Iterable[tuple[int, Iterable[Box]]]) -> TensorSharding:
        ranks: dict[Box, list[int]] = defaultdict(list)
        for rank, boxes in boxes_by_rank:
            for box in boxes:
                ranks[box].append(rank)
        return cls(tuple(ReplicatedShard(box, tuple(held)) for box, held in ranks.items()))

    def boxes_of(self, rank: int) -> tuple[Box, ...]:
        return tuple(sorted(h.box for h in self.shards if rank in h.ranks))


@dataclass(frozen=True)
class Sharding:
    """What every rank of one side holds: for each tensor, its spread. `ranks` is the side's window, in order."""

    ranks: tuple[int, ...]
    tensors: Mapping[str, TensorSpec]
    by_key: Mapping[str, TensorSharding]

    @classmethod
    def from_ranks(cls, by_rank: Mapping[int, RankSharding]) -> Sharding:
        """Turn per-rank rank shardings (as gathered from live models) into a sharding.

        Raises InventoryError where ranks state one tensor differently.
        """
        tensors: dict[str, TensorSpec] = {}
        boxes: dict[str, list[tuple[int, tuple[Box, ...]]]] = defaultdict(list)
        for rank, inventory in by_rank.items():
            for key, shard in inventory.shards.items():
                known = tensors.setdefault(key, shard.tensor)
                if known != shard.tensor:
                    raise ShardingError(f"rank {rank} states {key} as {shard.tensor}, another rank as {known}")
                boxes[key].append((rank, shard.boxes))
        # Layers of a kind lie alike: share one Spread object, so that the planner's memo finds it by value cheaply.
        shared: dict[TensorSharding, TensorSharding] = {}
        by_key = {
            key: shared.setdefault(tensor_sharding, tensor_sharding)
            for key, tensor_sharding in ((k, TensorSharding.of(b)) for k, b in boxes.items())
        }
        return cls(tuple(by_rank), tensors, by_key)

    def inventory(self, rank: int) -> RankSharding:
        """What `rank` holds."""
        boxes_of = {id(tensor_sharding): tensor_sharding.boxes_of(rank) for tensor_sharding in self._distinct}
        held = ((key, boxes_of[id(tensor_sharding)]) for key, tensor_sharding in self.by_key.items())
        return RankSharding({key: Shard(self.tensors[key], boxes) for key, boxes in held if boxes})

    @cached_property
    def _distinct(self) -> tuple[TensorSharding, ...]:
        return tuple({id(tensor_sharding): tensor_sharding for tensor_sharding in self.by_key.values()}.values())

    @cached_property
    def bytes_per_rank(self) -> Mapping[int, int]:
        """Weight bytes each rank holds."""
        held = dict.fromkeys(self.ranks, 0)
        for key, tensor_sharding in self.by_key.items():
            for shard in tensor_sharding.shards:
                nbytes = shard.box.volume * self.tensors[key].itemsize
                for rank in shard.ranks:
                    held[rank] += nbytes
        return held

    @property
    def num_parameters(self) -> int:
        """Elements of all global tensors, buffers included."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())
