"""Shardings of quantised tensors: codes and scales at the destination, and what crosses the wire to make them.

Blocks form a grid over the last two dims of the whole tensor. A destination's boxes must begin and end on that grid,
or at the tensor's end. A source's need not: `wire_shardings` quantises at the source the blocks that lie whole in what
one rank holds, and sends the others in the source's dtype, to be quantised where they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from refit.config.quantisation import CODES_DTYPE, KEPT, BlockFormat, Place, Quantisation, scale_key
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec

UNQUANTISED_SUFFIX = "@unquantised"
"""Behind a weight's key in the key of what is sent in the source's dtype."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of a tensor of `shape` `[..., rows, columns]`."""

    shape: tuple[int, ...]
    format: BlockFormat

    @property
    def steps(self) -> tuple[int, ...]:
        """The size of a block in every dim."""
        return (1,) * (len(self.shape) - 2) + (self.format.rows, self.format.columns)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """`[..., ceil(rows / block rows), ceil(columns / block columns)]`."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.steps, strict=True))

    def is_aligned(self, box: Box) -> bool:
        """Whether each block is wholly inside or wholly outside `box`."""
        return self.interior(box) == box

    def interior(self, box: Box) -> Box | None:
        """The largest box of whole blocks in `box`; None where there is no whole block."""
        ends = [
            end if end == size else end // step * step
            for end, size, step in zip(box.ends, self.shape, self.steps, strict=True)
        ]
        offsets = [-(-offset // step) * step for offset, step in zip(box.offsets, self.steps, strict=True)]
        return _box(offsets, ends)

    def hull(self, box: Box) -> Box:
        """The smallest box of whole blocks around `box`."""
        offsets = [offset // step * step for offset, step in zip(box.offsets, self.steps, strict=True)]
        ends = [
            min(-(-end // step) * step, size) for end, size, step in zip(box.ends, self.shape, self.steps, strict=True)
        ]
        found = _box(offsets, ends)
        assert found is not None
        return found

    def scales(self, box: Box) -> Box:
        """The scales of an aligned `box`, as a box of the tensor of scales."""
        offsets = [offset // step for offset, step in zip(box.offsets, self.steps, strict=True)]
        ends = [-(-end // step) for end, step in zip(box.ends, self.steps, strict=True)]
        found = _box(offsets, ends)
        assert found is not None
        return found

    def elements(self, box: Box) -> Box:
        """The elements whose scales are `box`, a box of the tensor of scales."""
        offsets = [offset * step for offset, step in zip(box.offsets, self.steps, strict=True)]
        ends = [min(end * step, size) for end, size, step in zip(box.ends, self.shape, self.steps, strict=True)]
        found = _box(offsets, ends)
        assert found is not None
        return found

    def num_blocks(self, boxes: Iterable[Box]) -> int:
        """Blocks in aligned boxes."""
        return sum(self.scales(box).volume for box in boxes)

    def unaligned(self, box: Box) -> tuple[int, int]:
        """The dim, counted from the end, in which `box` is not aligned, and the size of a block there."""
        for dim in (-2, -1):
            step = self.steps[dim]
            if box.offsets[dim] % step or (box.ends[dim] % step and box.ends[dim] != self.shape[dim]):
                return dim, step
        raise AssertionError("an aligned box")


def _box(offsets: list[int], ends: list[int]) -> Box | None:
    extents = tuple(end - offset for offset, end in zip(offsets, ends, strict=True))
    return Box(tuple(offsets), extents) if all(extent > 0 for extent in extents) else None


def check_kept(keys: Iterable[str], quantisation: Quantisation, name: str) -> None:
    """Raise UsageError where a given part of what stays BF16 is in no key; `name` is the side's. The default's parts
    are for models of all kinds."""
    found = [*keys]
    absent = next(
        (part for part in quantisation.kept if part not in KEPT and not any(part in key for key in found)), None
    )
    if absent is not None:
        raise UsageError(
            f"{name}: --fp8-keep-bf16 {absent} is in no tensor's key, keys are like {found[0]}: leave {absent} out"
        )


def quantised_sharding(sharding: Sharding, quantisation: Quantisation, name: str = "destination") -> Sharding:
    """`sharding` with codes and scales in place of the weights that `quantisation` names.

    Raises UsageError, calling the side `name`, where a cut does not lie on the grid of blocks.
    """
    by_key: dict[str, TensorSharding] = {}
    scaled: dict[tuple[int, tuple[int, ...]], TensorSharding] = {}
    problems: dict[str, str] = {}
    for key, tensor in sharding.tensors.items():
        held = sharding.by_key[key]
        by_key[key] = held
        if not quantisation.quantises(key, tensor.shape):
            continue
        grid = Grid(tensor.shape, quantisation.format)
        kind = (id(held), tensor.shape)
        problem = _problem(tensor, held, grid, quantisation) if kind not in scaled else None
        if problem is not None:
            problems[key] = problem
            continue
        if kind not in scaled:
            scaled[kind] = _mapped(held, grid.scales)
        by_key[scale_key(key)] = scaled[kind]
    if problems:
        first = next(iter(problems))
        remedy = "" if sharding.tensors[first].padded else "choose other sizes, or "
        raise UsageError(f"{name}: {problems[first]}: {remedy}{keep_text(problems, quantisation)}")
    return Sharding(sharding.ranks, quantised_tensors(sharding.tensors, quantisation), by_key)


def quantised_tensors(tensors: Mapping[str, TensorSpec], quantisation: Quantisation) -> dict[str, TensorSpec]:
    """`tensors` with codes and scales in place of those that `quantisation` names, in the same order."""
    found: dict[str, TensorSpec] = {}
    for key, tensor in tensors.items():
        found[key] = tensor
        if quantisation.quantises(key, tensor.shape):
            scales = scale_spec(tensor, Grid(tensor.shape, quantisation.format))
            found |= {key: replace(tensor, dtype=CODES_DTYPE), scales.key: scales}
    return found


def scale_spec(tensor: TensorSpec, grid: Grid) -> TensorSpec:
    """The tensor of the scales of `tensor`."""
    return TensorSpec(scale_key(tensor.key), grid.scale_shape, grid.format.scale_dtype, stacked=tensor.stacked)


def _mapped(held: TensorSharding, function: Callable[[Box], Box | None]) -> TensorSharding:
    """`held` with `function` of every box; boxes of which it makes None are left out."""
    ranks: dict[Box, tuple[int, ...]] = {}
    for shard in held.shards:
        box = function(shard.box)
        if box is not None:
            ranks[box] = (*ranks.get(box, ()), *shard.ranks)
    return TensorSharding(tuple(ReplicatedShard(box, holders) for box, holders in ranks.items()))


def _problem(tensor: TensorSpec, held: TensorSharding, grid: Grid, quantisation: Quantisation) -> str | None:
    """Why `tensor` cannot be divided into blocks as it is held; None where it can."""
    block = grid.format
    if tensor.padded:
        return (
            f"{tensor.key} is padded differently at each TP size, so its blocks are not those of {quantisation.dtype}"
        )
    if block.whole and tensor.shape[-1] % block.columns:
        return (
            f"{tensor.shape[-1]} columns of {tensor.key} cannot be divided into blocks of {block.columns} "
            f"({quantisation.dtype})"
        )
    for shard in held.shards:
        if not grid.is_aligned(shard.box):
            dim, step = grid.unaligned(shard.box)
            return (
                f"rank {shard.ranks[0]} holds {shard.box.extents[dim]} {('rows', 'columns')[dim]} of {tensor.key} from "
                f"{shard.box.offsets[dim]} on, which cannot be divided into blocks of {step} ({quantisation.dtype})"
            )
    return None


def keep_text(keys: Iterable[str], quantisation: Quantisation) -> str:
    """The remedy that leaves tensors as they are: `keep it in BF16 (--fp8-keep-bf16 embedding,...,linear_fc1)`."""
    names = (key.removesuffix(".weight").rpartition(".")[2] for key in keys)
    return f"keep it in BF16 (--fp8-keep-bf16 {','.join(dict.fromkeys((*quantisation.kept, *names)))})"


@dataclass(frozen=True, slots=True)
class WireShardings:
    """What a quantised refit moves: shardings of both sides that hold the same tensors of the same dtypes.

    Blocks quantised at the source are codes and scales in both; the others are `KEY` + UNQUANTISED_SUFFIX in both.
    `tensors` are the quantised ones as the source holds them.
    `reasons` says of each tensor with blocks quantised at the destination why, and `num_at_source` and
    `num_at_destination` count the blocks of all destination ranks.
    """

    source: Sharding
    destination: Sharding
    tensors: Mapping[str, TensorSpec]
    num_at_source: int
    num_at_destination: int
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Division:
    """One tensor's blocks. None where a side holds nothing of that kind."""

    source_codes: TensorSharding | None
    source_rest: TensorSharding | None
    destination_codes: TensorSharding | None
    destination_rest: TensorSharding | None
    num_at_source: int
    num_at_destination: int
    reason: str | None


def wire_shardings(source: Sharding, destination: Sharding, quantisation: Quantisation) -> WireShardings:
    """Divide the blocks of `destination`, a `quantised_sharding`, over the places where they are quantised.

    `source` is unquantised. Raises UsageError where it holds one of the tensors in another dtype than BF16, as a router
    that transformers keeps in float32, and where the place is SOURCE and a block lies whole in no rank's part.
    """
    tensors = {key: tensor for key, tensor in source.tensors.items() if scale_key(key) in destination.tensors}
    other = next((tensor for tensor in tensors.values() if tensor.dtype != "bfloat16"), None)
    if other is not None:
        raise UsageError(
            f"{quantisation.dtype} is made of BF16 weights, the source has {other.key} in {other.dtype}: "
            f"{keep_text([other.key], quantisation)}"
        )
    sides: tuple[_Side, _Side] = (_Side(source.ranks), _Side(destination.ranks))
    known: dict[tuple[int, int, tuple[int, ...]], _Division] = {}
    counts, reasons = [0, 0], {}
    for key, tensor in source.tensors.items():
        if key not in tensors:
            sides[0].add(tensor, source.by_key[key])
            continue
        grid = Grid(tensor.shape, quantisation.format)
        pair = (source.by_key[key], destination.by_key[key])
        kind = (id(pair[0]), id(pair[1]), tensor.shape)
        if kind not in known:
            known[kind] = _divide(*pair, grid, quantisation.place)
        division = known[kind]
        if division.reason is not None:
            reasons[key] = division.reason
            if quantisation.place is Place.SOURCE:
                raise UsageError(f"--quantise source: {key} cannot be quantised there: {division.reason}")
        counts[0] += division.num_at_source
        counts[1] += division.num_at_destination
        for side, codes, rest in (
            (sides[0], division.source_codes, division.source_rest),
            (sides[1], division.destination_codes, division.destination_rest),
        ):
            side.add(replace(tensor, dtype=CODES_DTYPE), codes)
            side.add(scale_spec(tensor, grid), _mapped(codes, grid.scales) if codes is not None else None)
            side.add(unquantised(tensor), rest)
    scales = {scale_key(key) for key in tensors}
    for key, tensor in destination.tensors.items():
        if key not in tensors and key not in scales:
            sides[1].add(tensor, destination.by_key[key])
    return WireShardings(sides[0].sharding, sides[1].sharding, tensors, counts[0], counts[1], reasons)


def unquantised(tensor: TensorSpec) -> TensorSpec:
    """`tensor` as it crosses the wire to be quantised at its destination."""
    return replace(tensor, key=tensor.key + UNQUANTISED_SUFFIX)


class _Side:
    """A Sharding that is being collected. Equal TensorShardings share one object."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks
        self._tensors: dict[str, TensorSpec] = {}
        self._by_key: dict[str, TensorSharding] = {}
        self._shared: dict[TensorSharding, TensorSharding] = {}

    def add(self, tensor: TensorSpec, held: TensorSharding | None) -> None:
        if held is not None:
            self._tensors[tensor.key] = tensor
            self._by_key[tensor.key] = self._shared.setdefault(held, held)

    @property
    def sharding(self) -> Sharding:
        return Sharding(self._ranks, self._tensors, self._by_key)


def _divide(source: TensorSharding, destination: TensorSharding, grid: Grid, place: Place) -> _Division:
    codes = None if place is Place.DESTINATION else _mapped(source, grid.interior)
    whole = coalesce(_disjoint(shard.box for shard in codes.shards)) if codes is not None else ()
    covered: list[ReplicatedShard] = []
    rest: list[ReplicatedShard] = []
    at_source = at_destination = 0
    for shard in destination.shards:
        inside = [part for box in whole if (part := shard.box.intersect(box)) is not None]
        outside = [shard.box]
        for box in inside:
            outside = [part for each in outside for part in each.subtract(box)]
        covered += (ReplicatedShard(box, shard.ranks) for box in coalesce(inside))
        rest += (ReplicatedShard(box, shard.ranks) for box in coalesce(outside))
        at_source += grid.num_blocks(inside) * len(shard.ranks)
        at_destination += grid.num_blocks(outside) * len(shard.ranks)
    reason = None
    if rest:
        reason = "--quantise destination" if place is Place.DESTINATION else _cut(source, grid)
    return _Division(
        source_codes=codes if covered else None,
        source_rest=source if rest else None,
        destination_codes=TensorSharding(tuple(covered)) if covered else None,
        destination_rest=TensorSharding(tuple(rest)) if rest else None,
        num_at_source=at_source,
        num_at_destination=at_destination,
        reason=reason,
    )


def _disjoint(boxes: Iterable[Box]) -> list[Box]:
    """The same elements as disjoint boxes."""
    found: list[Box] = []
    for box in boxes:
        parts = [box]
        for other in found:
            parts = [part for each in parts for part in each.subtract(other)]
        found += parts
    return found


def _cut(source: TensorSharding, grid: Grid) -> str:
    """Why some blocks lie whole in no rank's part: `64-row shards of 128-row blocks`."""
    box = next(shard.box for shard in source.shards if not grid.is_aligned(shard.box))
    dim, step = grid.unaligned(box)
    what = ("row", "column")[dim]
    return f"{box.extents[dim]}-{what} shards of {step}-{what} blocks"
