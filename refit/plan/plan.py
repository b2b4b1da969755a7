"""RefitPlan: which box of which tensor moves from which rank to which. Checked for completeness when built.

A plan has one or more stages. Stage 0 reads the source's weights. Each later stage reads what the stages before it have
delivered, in the destination's own memory: a rank passes on what it needs itself, so a relay stages nothing. With one
holder per node as the first,

    source rank 0       node A: ranks 2, 3      node B: ranks 4, 5
        w ──── stage 0 ────► 2 ── stage 1 ──► 3
        w ──── stage 0 ──────────────────────────► 4 ── stage 1 ──► 5

`w` crosses to each node once; in one stage it would cross four times. `shardings` are S_0, the source's; S_1, `w` on
ranks 2 and 4; S_2, the destination's, `w` on 2, 3, 4 and 5. Stage k moves weights from S_k to S_k+1, and writes only
what S_k+1 has beyond S_k. The plan in one stage is the case of two shardings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refit.plan import proof
from refit.plan.box import Box
from refit.plan.box_array import BoolArray, BoxArray, Boxes, Column, IntArray
from refit.plan.pieces import ZEROS
from refit.plan.sharding import Sharding, TensorSpec
from refit.plan.tensor_class import TensorClass

DIGEST_ROWS = 1 << 18
"""Routes that are hashed at a time, as 64-bit numbers."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """`box` of a tensor, read on rank `source` and written on rank `destination`. On one rank it is a local copy.

    In `stage` 0 it is read in the source's weights, in later ones in the destination's.
    """

    tensor: TensorSpec
    source_dtype: str
    box: Box
    source: int
    destination: int
    stage: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes written at the destination, in its dtype."""
        return self.box.volume * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The transfers of one rank. Each tuple is in plan order, which is the same at both ends of a pair."""

    rank: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    local: tuple[Transfer, ...]
    zeros: tuple[Transfer, ...]


@dataclass(frozen=True)
class RefitPlan:
    """Routes as columns: in stage `stage[i]`, route `i` moves `boxes[i]` of class `classes[tensor_class[i]]` from rank
    `source[i]` to rank `destination[i]`.

    Dim 0 of a box counts the tensors of its class, so a route stands for a transfer of each of them. The routes of all
    ranks are then as many as ranks and geometries make them, and only `for_rank` and `transfers` list transfers.

    Shapes: stage, tensor_class, source, destination `[num_routes]`; the boxes have `max_dims` dims, where classes with
    fewer have trailing offsets 0 and ends 1. The constructor raises PlanError unless every destination element is
    written exactly once and every read lies inside a box that its source rank holds by then (`proof`).
    """

    shardings: tuple[Sharding, ...]
    classes: tuple[TensorClass, ...]
    stage: Column
    tensor_class: Column
    source: Column
    destination: Column
    boxes: Boxes

    def __post_init__(self) -> None:
        proof.check(self)

    def __len__(self) -> int:
        return len(self.tensor_class)

    @property
    def source_sharding(self) -> Sharding:
        return self.shardings[0]

    @property
    def destination_sharding(self) -> Sharding:
        return self.shardings[-1]

    @property
    def num_stages(self) -> int:
        return len(self.shardings) - 1

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of both sides, ascending."""
        return tuple(sorted({*self.source_sharding.ranks, *self.destination_sharding.ranks}))

    @cached_property
    def nbytes(self) -> IntArray:
        """Bytes each route writes, `[num_routes]`."""
        itemsizes = np.array([each.itemsize for each in self.classes], np.int64)
        nbytes = self.boxes.volumes
        nbytes *= itemsizes[self.tensor_class]
        return nbytes

    @property
    def num_transfers(self) -> int:
        """Wire transfers and local copies."""
        boxes = self.boxes[np.not_equal(self.source, ZEROS)]
        return int(boxes.distinct.extents[:, 0][boxes.number].sum())

    @property
    def is_local(self) -> BoolArray:
        return np.equal(self.source, self.destination)

    @property
    def is_wire(self) -> BoolArray:
        """Routes that leave their source rank."""
        return np.not_equal(self.source, self.destination) & np.not_equal(self.source, ZEROS)

    def transfers(self, routes: IntArray | None = None) -> Iterator[Transfer]:
        """The transfers of all routes, or of those with the indices `routes`, in plan order.

        That is the order of the stages, then of the destination's tensors, then of the boxes' offsets, then of the
        destination rank.

        A route becomes as many rows as its box has tensors. For two routes, of a class whose tensors are t0 to t4:

            routes              boxes (dim 0)       rows
            0: rank 7 to 9      [1, 4)              t1 7→9   t2 7→9   t3 7→9
            1: rank 8 to 9      [4, 5)              t4 8→9

            counts = [3, 1]                         tensors of each route
            row    = [0, 0, 0, 1]                   the route of each row
            place  = [1, 2, 3, 4]                   its tensor in the class: 0, 1, 2 and 0 counted from the offsets 1, 4
            number = place + the class's first tensor among those of all classes
        """
        routes = np.arange(len(self)) if routes is None else routes
        boxes, classes = self.boxes[routes].expanded, self.tensor_class[routes]
        counts = boxes.extents[:, 0]
        row = np.repeat(np.arange(len(routes)), counts)
        # Rows before a route's own are subtracted, so that its rows count from 0, and its offset is added.
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - boxes.offsets[:, 0], counts)
        number = self._first_tensor[classes[row]] + place
        by_offsets = [boxes.offsets[row, dim] for dim in reversed(range(1, boxes.dims))]
        # lexsort's last key counts most. Classes interleave layers: only the position restores the tensors' order.
        order = np.lexsort(
            (self.destination[routes[row]], *by_offsets, self._position[number], self.stage[routes[row]])
        )
        # A route's transfers differ in their tensor alone, so they share one Box.
        parts = [_tensor_box(boxes, each, self.classes[classes[each]].dims) for each in range(len(routes))]
        columns = (self.source[routes].tolist(), self.destination[routes].tolist(), self.stage[routes].tolist())
        sources, destinations, stages = columns
        for each, tensor in zip(row[order].tolist(), number[order].tolist(), strict=True):
            spec, source, stage = self._tensors[tensor], sources[each], stages[each]
            dtype = spec.dtype if stage or source == ZEROS else self.source_sharding.tensors[spec.key].dtype
            yield Transfer(spec, dtype, parts[each], source, destinations[each], stage)

    def for_rank(self, rank: int) -> RankPlan:
        """The transfers that `rank` sends, receives, copies locally and zeroes."""

        def select(mask: BoolArray) -> tuple[Transfer, ...]:
            return tuple(self.transfers(np.flatnonzero(mask)))

        return RankPlan(
            rank,
            sends=select(self.is_wire & (self.source == rank)),
            receives=select(self.is_wire & (self.destination == rank)),
            local=select(self.is_local & (self.destination == rank)),
            zeros=select((self.source == ZEROS) & (self.destination == rank)),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the keys and columns. Equal digests mean equal transfers."""
        keys = "\n".join(" ".join(tensor.key for tensor in each.tensors) for each in self.classes)
        sha = hashlib.sha256(keys.encode())
        columns: list[Callable[[slice], Column]] = [
            lambda rows: self.tensor_class[rows],
            lambda rows: self.source[rows],
            lambda rows: self.destination[rows],
            lambda rows: self.boxes[rows].offsets,
            lambda rows: self.boxes[rows].ends,
        ]
        # In one stage the column says nothing, and plans of older versions, which lack it, keep their digests.
        if self.num_stages > 1:
            columns.append(lambda rows: self.stage[rows])
        for column in columns:
            for begin in range(0, len(self), DIGEST_ROWS):
                sha.update(np.ascontiguousarray(column(slice(begin, begin + DIGEST_ROWS)), np.int64).data)
        return sha.hexdigest()

    @cached_property
    def casts(self) -> dict[str, tuple[str, str]]:
        """Tensors whose dtype the refit changes: key -> (source dtype, destination dtype)."""
        theirs = self.source_sharding.tensors
        return {
            key: (theirs[key].dtype, spec.dtype)
            for key, spec in self.destination_sharding.tensors.items()
            if theirs[key].dtype != spec.dtype
        }

    @cached_property
    def _tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors, class by class."""
        return tuple(tensor for each in self.classes for tensor in each.tensors)

    @cached_property
    def _first_tensor(self) -> IntArray:
        """The index in `_tensors` of each class's first."""
        sizes = np.array([len(each.tensors) for each in self.classes], np.int64)
        return np.cumsum(sizes) - sizes

    @cached_property
    def _position(self) -> IntArray:
        """The position of each of `_tensors` among the destination's."""
        position = {key: index for index, key in enumerate(self.destination_sharding.tensors)}
        return np.array([position[tensor.key] for tensor in self._tensors], np.int64)


def _tensor_box(boxes: BoxArray, row: int, dims: int) -> Box:
    """A row's box without dim 0 and without dims that its class lacks."""
    return Box(tuple(boxes.offsets[row, 1:dims].tolist()), tuple(boxes.extents[row, 1:dims].tolist()))
