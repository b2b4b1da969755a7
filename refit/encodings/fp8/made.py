"""Where a source's codes and scales lie: at home or in shadows.

What this rank's own destination wants is made there, at home: it is written once, nothing is staged for it, and what
other ranks want of it is sent from there. What only others want is made in shadows, memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from refit.config.quantisation import CODES_DTYPE, BlockFormat, scale_key
from refit.memory.weights import LocalShard, LocalWeights, new_shard
from refit.plan.box import Box, coalesce
from refit.plan.plan import RankPlan
from refit.plan.quantised import Grid, scale_spec
from refit.plan.sharding import TensorSpec


@dataclass(frozen=True, slots=True)
class Made:
    """The codes and scales of `box` of `tensor`, whole blocks."""

    tensor: TensorSpec
    box: Box
    codes: LocalShard
    scales: LocalShard


@dataclass(slots=True)
class _Wanted:
    """The elements of a tensor whose codes or scales are wanted: all of them, and those that this rank wants itself."""

    everything: list[Box] = field(default_factory=list)
    own_codes: list[Box] = field(default_factory=list)
    own_scales: list[Box] = field(default_factory=list)


class Places:
    """`homes` and `shadows` of one rank: disjoint, and together at least all that `part`, its plan, sends of `tensors`.

    Homes follow the destination's storage, since their owners are the destination's.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        block: BlockFormat,
        source: LocalWeights,
        destination: LocalWeights | None,
        part: RankPlan,
    ) -> None:
        self._block = block
        self._source = source
        self._held = source.rank_sharding.shards
        self.homes: list[Made] = []
        self.shadows: list[Made] = []
        for key, wanted in _wanted(tensors, block, part).items():
            tensor = tensors[key]
            homes = [] if destination is None else list(self._new_homes(tensor, wanted, destination))
            self.homes += homes
            self.shadows += self._new_shadows(tensor, wanted.everything, coalesce(home.box for home in homes))

    def _new_homes(self, tensor: TensorSpec, wanted: _Wanted, destination: LocalWeights) -> Iterator[Made]:
        """The blocks of which this rank wants both codes and scales, as its destination's shards hold them."""
        grid = Grid(tensor.shape, self._block)
        codes_spec, scales_spec = replace(tensor, dtype=CODES_DTYPE), scale_spec(tensor, grid)
        for box in _common(wanted.own_codes, wanted.own_scales):
            blocks = grid.interior(box)
            for codes in destination.parts(tensor.key, blocks) if blocks is not None else ():
                if not grid.is_aligned(codes.box):
                    continue
                scales = destination.parts(scales_spec.key, grid.scales(codes.box))
                if len(scales) == 1 and self._suit(codes.view, scales[0].view):
                    here = replace(codes, tensor=codes_spec), replace(scales[0], tensor=scales_spec)
                    yield Made(tensor, codes.box, *here)

    def _suit(self, codes: torch.Tensor, scales: torch.Tensor) -> bool:
        """Whether the kernel can write there: these dtypes, in contiguous rows, beside the weights."""
        dtypes = (getattr(torch, CODES_DTYPE), getattr(torch, self._block.scale_dtype))
        return (codes.dtype, scales.dtype) == dtypes and all(
            each.device == self._source.device and (each.shape[-1] == 1 or each.stride(-1) == 1)
            for each in (codes, scales)
        )

    def _new_shadows(self, tensor: TensorSpec, wanted: Iterable[Box], homes: Iterable[Box]) -> Iterator[Made]:
        """Memory for what has no home: per box that the source holds, the box of blocks around it, without homes."""
        grid = Grid(tensor.shape, self._block)
        hulls: dict[Box, Box] = {}
        for box in _without(wanted, homes):
            outer = next(each for each in self._held[tensor.key].boxes if each.contains(box))
            hull = grid.hull(box)
            hulls[outer] = _around(hulls[outer], hull) if outer in hulls else hull
        for box in _without(hulls.values(), homes):
            codes = new_shard(replace(tensor, dtype=CODES_DTYPE), box, self._source.device)
            scales = new_shard(scale_spec(tensor, grid), grid.scales(box), self._source.device)
            yield Made(tensor, box, codes, scales)


def _wanted(tensors: Mapping[str, TensorSpec], block: BlockFormat, part: RankPlan) -> dict[str, _Wanted]:
    """By the key of the weights, what is wanted of the source in stage 0: later stages pass on what has arrived."""
    of_scales = {scale_key(key): key for key in tensors}
    found: dict[str, _Wanted] = {}
    for transfers, is_own in ((part.sends, False), (part.local, True)):
        for transfer in transfers:
            key = of_scales.get(transfer.tensor.key, transfer.tensor.key)
            if key not in tensors or transfer.stage > 0:
                continue
            wanted = found.setdefault(key, _Wanted())
            is_codes = key == transfer.tensor.key
            box = transfer.box if is_codes else Grid(tensors[key].shape, block).elements(transfer.box)
            wanted.everything.append(box)
            if is_own:
                (wanted.own_codes if is_codes else wanted.own_scales).append(box)
    return found


def _common(boxes: Iterable[Box], others: Iterable[Box]) -> tuple[Box, ...]:
    """The elements that both have. Boxes are disjoint in either."""
    one, other = coalesce(boxes), coalesce(others)
    if one == other:
        return one
    return coalesce(part for box in one for each in other if (part := box.intersect(each)) is not None)


def _without(boxes: Iterable[Box], others: Iterable[Box]) -> list[Box]:
    rest = [*boxes]
    for other in others:
        rest = [part for box in rest for part in box.subtract(other)]
    return rest


def _around(one: Box, other: Box) -> Box:
    """The smallest box around two."""
    offsets = tuple(map(min, one.offsets, other.offsets))
    ends = map(max, one.ends, other.ends)
    return Box(offsets, tuple(end - offset for end, offset in zip(ends, offsets, strict=True)))
