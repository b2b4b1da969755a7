"""Where a source's codes and scales lie: at home, abroad or in shadows.

What this rank's own destination wants is made there, at home: it is written once, nothing is staged for it, and what
other ranks want of it is sent from there. What only one other rank wants is made abroad, in that rank's destination,
where the transport has mapped it and it is of the same device. The rest is made in shadows, memory of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from refit.config.quantisation import CODES_DTYPE, BlockFormat, scale_key
from refit.encodings.fp8.pipeline import OnDemand, PipelinedWeights
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
    """The elements of a tensor whose codes, and whose scales, each rank wants."""

    codes: dict[int, list[Box]] = field(default_factory=lambda: defaultdict(list))
    scales: dict[int, list[Box]] = field(default_factory=lambda: defaultdict(list))

    def everything(self, but: int | None = None) -> Iterator[Box]:
        """What is wanted; by others where a rank is given."""
        for boxes_of in (self.codes, self.scales):
            for rank, boxes in boxes_of.items():
                if rank != but:
                    yield from boxes


class Places:
    """The places of one rank: disjoint, and together at least all that `part`, its plan, sends of `tensors`.

    Homes follow the destination's storage, since their owners are the destination's. Shadows are allocated when they
    are first asked for; from then on what is abroad stays so.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        block: BlockFormat,
        source: LocalWeights,
        destination: LocalWeights | None,
        rank: int,
        part: RankPlan,
    ) -> None:
        self._tensors = tensors
        self._block = block
        self.device = source.device
        self._held = source.rank_sharding.shards
        self._wanted = _wanted(tensors, block, part)
        self._abroad: dict[int, list[Made]] = {}
        self._shadows: list[Made] | None = None
        self._homes: dict[str, list[Made]] = {}
        if destination is not None:
            for key, wanted in self._wanted.items():
                self._homes[key] = list(self._placed(tensors[key], wanted, rank, (), destination))

    @property
    def homes(self) -> list[Made]:
        return [home for homes in self._homes.values() for home in homes]

    @property
    def abroad(self) -> list[Made]:
        return [made for of_peer in self._abroad.values() for made in of_peer]

    @property
    def shadows(self) -> list[Made]:
        if self._shadows is None:
            taken: dict[str, list[Box]] = defaultdict(list)
            for made in (*self.homes, *self.abroad):
                taken[made.tensor.key].append(made.box)
            self._shadows = [
                made
                for key, wanted in self._wanted.items()
                for made in self._new_shadows(self._tensors[key], wanted.everything(), coalesce(taken[key]))
            ]
        return self._shadows

    def reaches(self, peer: int, theirs: LocalWeights) -> bool:
        """`theirs` is the destination of `peer`, which this rank can write. Returns whether anything is made there."""
        if peer in self._abroad:
            self._abroad[peer] = [_moved(made, theirs) for made in self._abroad[peer]]
        elif self._shadows is None:
            self._abroad[peer] = [
                made
                for key, wanted in self._wanted.items()
                for made in self._placed(self._tensors[key], wanted, peer, self._others(key, wanted, peer), theirs)
            ]
        return bool(self._abroad.get(peer))

    def of(self, peer: int) -> list[Made]:
        """What is made abroad at `peer`."""
        return self._abroad.get(peer, [])

    def _others(self, key: str, wanted: _Wanted, peer: int) -> list[Box]:
        """The blocks that ranks other than `peer` want, too."""
        grid = Grid(self._tensors[key].shape, self._block)
        return list(dict.fromkeys(grid.hull(box) for box in wanted.everything(but=peer)))

    def _placed(
        self, tensor: TensorSpec, wanted: _Wanted, rank: int, others: Iterable[Box], weights: LocalWeights
    ) -> Iterator[Made]:
        """The blocks without `others` of which `rank` wants both codes and scales, as its `weights` hold them."""
        grid = Grid(tensor.shape, self._block)
        codes_spec, scales_spec = replace(tensor, dtype=CODES_DTYPE), scale_spec(tensor, grid)
        for box in _without(_common(wanted.codes[rank], wanted.scales[rank]), others):
            blocks = grid.interior(box)
            for codes in weights.parts(tensor.key, blocks) if blocks is not None else ():
                if not grid.is_aligned(codes.box):
                    continue
                scales = weights.parts(scales_spec.key, grid.scales(codes.box))
                if len(scales) == 1 and self._suit(codes.view, scales[0].view):
                    there = replace(codes, tensor=codes_spec), replace(scales[0], tensor=scales_spec)
                    yield Made(tensor, codes.box, *there)

    def _suit(self, codes: torch.Tensor, scales: torch.Tensor) -> bool:
        """Whether the kernel can write there: these dtypes, in contiguous rows, beside the weights."""
        dtypes = (getattr(torch, CODES_DTYPE), getattr(torch, self._block.scale_dtype))
        return (codes.dtype, scales.dtype) == dtypes and all(
            each.device == self.device and (each.shape[-1] == 1 or each.stride(-1) == 1) for each in (codes, scales)
        )

    def _new_shadows(self, tensor: TensorSpec, wanted: Iterable[Box], taken: Iterable[Box]) -> Iterator[Made]:
        """Memory for what is not `taken`: per box that the source holds, the box of blocks around it, without these."""
        grid = Grid(tensor.shape, self._block)
        hulls: dict[Box, Box] = {}
        for box in _without(wanted, taken):
            outer = next(each for each in self._held[tensor.key].boxes if each.contains(box))
            hull = grid.hull(box)
            hulls[outer] = _around(hulls[outer], hull) if outer in hulls else hull
        for box in _without(hulls.values(), taken):
            codes = new_shard(replace(tensor, dtype=CODES_DTYPE), box, self.device)
            scales = new_shard(scale_spec(tensor, grid), grid.scales(box), self.device)
            yield Made(tensor, box, codes, scales)


def _wanted(tensors: Mapping[str, TensorSpec], block: BlockFormat, part: RankPlan) -> dict[str, _Wanted]:
    """By the key of the weights, what is wanted of the source in stage 0: later stages pass on what has arrived."""
    of_scales = {scale_key(key): key for key in tensors}
    found: dict[str, _Wanted] = {}
    for transfer in (*part.sends, *part.local):
        key = of_scales.get(transfer.tensor.key, transfer.tensor.key)
        if key not in tensors or transfer.stage > 0:
            continue
        wanted = found.setdefault(key, _Wanted())
        if key == transfer.tensor.key:
            wanted.codes[transfer.destination].append(transfer.box)
        else:
            wanted.scales[transfer.destination].append(Grid(tensors[key].shape, block).elements(transfer.box))
    return found


def _moved(made: Made, theirs: LocalWeights) -> Made:
    """`made` in `theirs`, which have the same shards as before in other memory."""
    (codes,) = theirs.parts(made.codes.tensor.key, made.codes.box)
    (scales,) = theirs.parts(made.scales.tensor.key, made.scales.box)
    return replace(
        made, codes=replace(codes, tensor=made.codes.tensor), scales=replace(scales, tensor=made.scales.tensor)
    )


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


class MadeWeights(PipelinedWeights):
    """A source as the wire sees it: its `weights` under the keys that they are sent under, what is made at `places`."""

    def __init__(self, weights: Iterable[LocalShard], places: Places, pipeline: OnDemand) -> None:
        super().__init__((*weights, *_shards(places.homes)), pipeline)
        self._places = places
        self._is_complete = False

    def __iter__(self) -> Iterator[LocalShard]:
        self._complete()
        return super().__iter__()

    @property
    def device(self) -> torch.device:
        return self._places.device

    @property
    def made(self) -> list[Made]:
        return [*self._places.homes, *self._places.abroad, *self._places.shadows]

    @property
    def shadows(self) -> list[Made]:
        return self._places.shadows

    def reaches(self, peer: int, theirs: LocalWeights) -> None:
        if self._places.reaches(peer, theirs) and self._is_complete:
            self._hold(_shards(self._places.of(peer)))
            self._pipeline.rebind()

    def parts(self, key: str, box: Box) -> list[LocalShard]:
        self._complete()
        return super().parts(key, box)

    def _complete(self) -> None:
        """Hold what is not at home too. The first to ask comes when the transport has said which peers it reaches."""
        if not self._is_complete:
            self._is_complete = True
            self._hold(_shards((*self._places.abroad, *self._places.shadows)))


def _shards(made: Iterable[Made]) -> Iterator[LocalShard]:
    for each in made:
        yield from (each.codes, each.scales)
