"""A small model for transport tests. It cuts, stacks and casts tensors in all the ways of a real model."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refit.config.layout import Layout
from refit.config.options import MethodOptions
from refit.config.registry import METHODS, load, option_flags
from refit.memory.weights import LocalShard, LocalWeights, new_shard
from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, Sharding, TensorSpec

VOCAB = 50


def own(method: str, buffers: str) -> MethodOptions | None:
    """The settings of `method` with these buffers; None for a method that has none."""
    kind = METHODS[method].options
    found: MethodOptions | None = load(kind)(buffers=buffers) if kind and "buffers" in option_flags(kind) else None
    return found


@dataclass(frozen=True)
class Case:
    """Two layouts of the small model."""

    source: Layout
    destination: Layout
    hidden: int = 24
    ffn: int = 48
    experts: int = 8
    cast: bool = True

    @property
    def plan(self) -> RefitPlan:
        return plan_refit(self._sharding(self.source, True), self._sharding(self.destination, False))

    def _sharding(self, layout: Layout, is_source: bool) -> Sharding:
        return Sharding.from_ranks({rank: self._rank_sharding(layout, rank, is_source) for rank in layout.ranks})

    def _rank_sharding(self, layout: Layout, rank: int, is_source: bool) -> RankSharding:
        return RankSharding.of((spec, box) for group in self.groups(layout, rank, is_source) for spec, box in group)

    def groups(self, layout: Layout, rank: int, is_source: bool) -> Iterator[list[tuple[TensorSpec, Box]]]:
        """For each parameter of `rank`, the parts that it holds, stacked along dim 0."""
        at = layout.coordinates(rank)
        hidden, ffn, experts = self.hidden, self.ffn, self.experts
        norm_dtype = "bfloat16" if is_source and self.cast else "float32"
        vocab = -(-VOCAB // (8 * layout.tp)) * 8 * layout.tp
        bf16 = "bfloat16"
        embedding = TensorSpec("embedding", (vocab, hidden), bf16, padded=True)
        yield [(embedding, _cut(Box.whole(embedding.shape), 0, at.tp, layout.tp))]
        for key, shape, dim in (("qkv", (3 * hidden, hidden), 0), ("proj", (hidden, ffn), 1)):
            yield [(TensorSpec(key, shape, bf16), _cut(Box.whole(shape), dim, at.tp, layout.tp))]
        yield _gated(TensorSpec("fc1", (2 * ffn, hidden), bf16), Box.whole((2 * ffn, hidden)), 0, at.tp, layout.tp)
        for key, shape, dtype in (
            ("norm", (hidden,), norm_dtype),
            ("bias", (experts,), "float32"),
            ("odd", (3,), "int64"),
        ):
            yield [(TensorSpec(key, shape, dtype), Box.whole(shape))]
        per_rank = experts // layout.ep
        for expert in range(at.ep * per_rank, (at.ep + 1) * per_rank):
            fc1 = TensorSpec("experts.fc1", (experts, 2 * ffn, hidden), bf16, stacked=True)
            fc2 = TensorSpec("experts.fc2", (experts, hidden, ffn), bf16, stacked=True)
            yield _gated(fc1, Box.whole(fc1.shape).narrow(0, expert, expert + 1), 1, at.etp, layout.etp)
            yield [(fc2, _cut(Box.whole(fc2.shape).narrow(0, expert, expert + 1), 2, at.etp, layout.etp))]

    def memory(self, side: Layout, rank: int) -> LocalWeights | None:
        """Poisoned weights of one side on `rank`; None on ranks outside the side."""
        if rank not in side.ranks:
            return None
        groups = self.groups(side, rank, side is self.source)
        return LocalWeights(shard for group in groups for shard in _live(group))


def memory_of(sharding: Sharding, rank: int) -> LocalWeights | None:
    """Poisoned weights of `rank`, each box in memory of its own; None on ranks outside the side."""
    if rank not in sharding.ranks:
        return None
    shards = sharding.of_rank(rank).shards.values()
    parts = ((shard.tensor, part) for shard in shards for box in shard.boxes for part in shard.tensor.memory_boxes(box))
    memory = LocalWeights(new_shard(tensor, part, torch.device("cpu")) for tensor, part in parts)
    poison(memory)
    return memory


def _cut(box: Box, dim: int, index: int, count: int) -> Box:
    size = box.extents[dim] // count
    return box.narrow(dim, box.offsets[dim] + index * size, box.offsets[dim] + (index + 1) * size)


def _gated(spec: TensorSpec, box: Box, dim: int, index: int, count: int) -> list[tuple[TensorSpec, Box]]:
    half = box.offsets[dim] + box.extents[dim] // 2
    halves = (box.narrow(dim, box.offsets[dim], half), box.narrow(dim, half, box.ends[dim]))
    return [(spec, _cut(part, dim, index, count)) for part in halves]


def _live(group: list[tuple[TensorSpec, Box]]) -> Iterator[LocalShard]:
    spec, first = group[0]
    shape = first.extents[1:] if spec.stacked else first.extents
    rows = shape[0]
    dtype = getattr(torch, spec.dtype)
    owner = torch.nn.Parameter(torch.full((len(group) * rows, *shape[1:]), 77).to(dtype), requires_grad=False)
    for number, (tensor, box) in enumerate(group):
        yield LocalShard(tensor, box, owner, owner.detach()[number * rows : (number + 1) * rows].view(box.extents))


@functools.lru_cache(maxsize=32)
def content(key: str, shape: tuple[int, ...], iteration: int) -> torch.Tensor:
    """The values of a global tensor in one iteration. They are exact in bfloat16, so that casts keep them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{iteration}".encode()))
    return torch.randint(-(2**7), 2**7, shape, generator=generator, dtype=torch.int16)


def fill(memory: LocalWeights, iteration: int) -> None:
    for shard in memory:
        shard.view.copy_(
            content(shard.tensor.key, shard.tensor.shape, iteration)[shard.box.slices_within(_whole(shard))]
        )


def poison(memory: LocalWeights) -> None:
    for shard in memory:
        shard.view.fill_(-99)


def wrong_tensors(memory: LocalWeights, plan: RefitPlan, iteration: int) -> list[str]:
    """The destination's tensors that differ from the values of the source, with zeros as padding."""
    wrong = []
    for shard in memory:
        known = content(shard.tensor.key, plan.source_sharding.tensors[shard.tensor.key].shape, iteration)
        wanted = torch.zeros(shard.tensor.shape, dtype=known.dtype)
        rows = min(known.shape[0], wanted.shape[0])
        wanted[:rows] = known[:rows]
        part = wanted[shard.box.slices_within(_whole(shard))].to(shard.view.dtype)
        if not torch.equal(part, shard.view):
            wrong.append(f"{shard.tensor.key} {shard.box}")
    return wrong


def _whole(shard: LocalShard) -> Box:
    return Box.whole(shard.tensor.shape)
