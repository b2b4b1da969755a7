"""The grid of blocks of a quantised tensor, and the shardings of sides that hold codes and scales.

Blocks form a grid over the last two dims of the whole tensor. A destination's boxes must begin and end on that grid,
or at the tensor's end. A source's need not. An example: a tensor of 300 rows in blocks of 128, of which a rank holds
the 160 rows from 100 on.

    row      0            100  128                    256 260  300
    block    |------- 0 -------|--------- 1 ----------|-- 2 ---|     the last block may be smaller
    held                   [===========================]
    interior                   [======================]              block 1: the only one that lies whole in it
    hull     [==================================================]    blocks 0 to 2: all that it touches
    scales   0                 1                      2              one row of scales per row of blocks

`scales` and `elements` turn one grid into the other: rows 128 to 256 have the scale 1, and the scales 1 and 2 are those
of rows 128 to 300.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from refit.config.quantisation import CODES_DTYPE, KEPT, BlockFormat, Quantisation, scale_key
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec


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
        # Inwards to the grid. A box that ends with the tensor has the last block whole, however few rows that has.
        ends = [
            end if end == size else end // step * step
            for end, size, step in zip(box.ends, self.shape, self.steps, strict=True)
        ]
        offsets = [-(-offset // step) * step for offset, step in zip(box.offsets, self.steps, strict=True)]
        return _box(offsets, ends)

    def hull(self, box: Box) -> Box:
        """The smallest box of whole blocks around `box`."""
        # Outwards to the grid, but not beyond the tensor.
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
            scaled[kind] = mapped(held, grid.scales)
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


def mapped(held: TensorSharding, function: Callable[[Box], Box | None]) -> TensorSharding:
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
