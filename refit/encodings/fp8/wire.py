"""The pure part of FP8: which codes, scales and unquantised weights cross the wire. Imports no torch.

`wire_shardings` quantises at the source the blocks that lie whole in what one rank holds, and sends the others in the
source's dtype, to be quantised where they arrive. An example: 384 rows in three blocks of 128, which two source ranks
hold 192 rows each of, and one destination rank whole.

    row               0             128     192    256             384
    block             |----- 0 -----|----- 1 ------|------ 2 ------|
    source rank 0     [=====================]
    source rank 1                           [======================]
    whole at one      |----- 0 -----|              |------ 2 ------|    codes of these rows, and scales 0 and 2
    cut                             [=======|======]                    rows 128 to 256, unquantised

The destination gets the codes of rows 0 to 128 and 256 to 384 with two rows of scales, and `KEY@unquantised` of the 128
rows between, from both ranks. It quantises these together, since their scale follows from all 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refit.config.quantisation import CODES_DTYPE, Place, Quantisation, scale_key
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.box_array import BoolArray, IntArray
from refit.plan.cost import bytes_by_rank
from refit.plan.plan import RefitPlan
from refit.plan.quantised import Grid, keep_text, mapped, scale_spec
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec
from refit.plan.wire import Wire

UNQUANTISED_SUFFIX = "@unquantised"
"""Behind a weight's key in the key of what is sent in the source's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedWire(Wire):
    """What a refit to codes and scales moves.

    Blocks quantised at the source are codes and scales in both shardings; the others are `KEY` + UNQUANTISED_SUFFIX in
    both. `tensors` are the quantised ones as the source holds them.
    `reasons` says of each tensor with blocks quantised at the destination why, and `num_at_source` and
    `num_at_destination` count the blocks of all destination ranks.
    """

    quantisation: Quantisation
    tensors: Mapping[str, TensorSpec]
    num_at_source: int
    num_at_destination: int
    reasons: dict[str, str]
    is_pipelined: bool = True
    work: str = "quantising"

    def memory_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """Codes and scales that a source sends to other ranks, what waits to be quantised elsewhere.

        A source keeps what it sends, and what it sends to several ranks once: at most the codes of all that it holds.
        What its own destination wants is made there.
        """
        routes = self._routes(plan)
        needed = bytes_by_rank(plan, plan.source, (routes.codes | routes.scales) & (plan.source != plan.destination))
        for rank, nbytes in self._made_bytes.items():
            needed[rank] = min(needed[rank], nbytes)
        return _where_any(needed + bytes_by_rank(plan, plan.destination, routes.waits))

    def work_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """Quantising reads 2 bytes where a copy of the code would read 1, and no scale.

        What waits is read again, and written as codes of half its bytes. A code that several ranks want is made once.
        """
        routes = self._routes(plan)
        codes = bytes_by_rank(plan, plan.source, routes.codes)
        for rank, nbytes in _bytes_of(self.source, lambda key: key in self.tensors).items():
            codes[rank] = min(codes[rank], nbytes)
        made = np.maximum(0, codes - bytes_by_rank(plan, plan.source, routes.scales))
        return _where_any(made + bytes_by_rank(plan, plan.destination, routes.waits) * 3 // 2)

    def _routes(self, plan: RefitPlan) -> _Routes:
        scales = {scale_key(key) for key in self.tensors}
        first = [each.tensors[0] for each in plan.classes]
        kinds = (
            [tensor.dtype == CODES_DTYPE for tensor in first],
            [tensor.key in scales for tensor in first],
            [tensor.key.endswith(UNQUANTISED_SUFFIX) for tensor in first],
        )
        codes, scale, waits = (np.array(kind, np.bool_)[plan.tensor_class] for kind in kinds)
        # What a later stage passes on was made at a source, and lies in the destination's own memory.
        return _Routes(codes & (plan.stage == 0), scale & (plan.stage == 0), waits)

    @property
    def most_memory_bytes(self) -> Mapping[str, Mapping[int, int]]:
        """All codes and scales that a source can make, and all that waits."""
        waiting = _bytes_of(self.destination, lambda key: key.endswith(UNQUANTISED_SUFFIX))
        return {"source": self._made_bytes, "destination": waiting}

    @property
    def _made_bytes(self) -> Mapping[int, int]:
        """Codes and scales that each source rank holds of what is quantised at the source."""
        scales = {scale_key(key) for key in self.tensors}
        return _bytes_of(self.source, lambda key: key in scales or key in self.tensors)


@dataclass(frozen=True, slots=True)
class _Routes:
    """Which routes of a plan have codes and scales made at the source, and what is quantised where it arrives."""

    codes: BoolArray
    scales: BoolArray
    waits: BoolArray


def _where_any(nbytes: IntArray) -> dict[int, int]:
    return {rank: int(each) for rank, each in enumerate(nbytes) if each}


def _bytes_of(sharding: Sharding, chosen: Callable[[str], bool]) -> Mapping[int, int]:
    held = {key: each for key, each in sharding.by_key.items() if chosen(key)}
    return Sharding(sharding.ranks, sharding.tensors, held).bytes_per_rank


def wire_to(source: Sharding, destination: Sharding, side: SideSpec) -> QuantisedWire:
    """What crosses to `destination`, the sharding of the FP8 side `side`. Raises UsageError as `wire_shardings`."""
    assert side.quantisation is not None
    return wire_shardings(source, destination, side.quantisation)


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


def wire_shardings(source: Sharding, destination: Sharding, quantisation: Quantisation) -> QuantisedWire:
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
            side.add(scale_spec(tensor, grid), mapped(codes, grid.scales) if codes is not None else None)
            side.add(unquantised(tensor), rest)
    scales = {scale_key(key) for key in tensors}
    for key, tensor in destination.tensors.items():
        if key not in tensors and key not in scales:
            sides[1].add(tensor, destination.by_key[key])
    return QuantisedWire(
        source=sides[0].sharding,
        destination=sides[1].sharding,
        quantisation=quantisation,
        tensors=tensors,
        num_at_source=counts[0],
        num_at_destination=counts[1],
        reasons=reasons,
    )


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
    # A source whose cuts lie on the grid is its own interior, and the rest is empty.
    codes = None if place is Place.DESTINATION else mapped(source, grid.interior)
    whole = coalesce(_disjoint(shard.box for shard in codes.shards)) if codes is not None else ()
    covered: list[ReplicatedShard] = []
    rest: list[ReplicatedShard] = []
    at_source = at_destination = 0
    for shard in destination.shards:
        inside = [part for box in whole if (part := shard.box.intersect(box)) is not None]
        # What no source rank can quantise: the destination's box without all blocks that are whole at one.
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
