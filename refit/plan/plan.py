"""RefitPlan: which box of which tensor moves from which rank to which. Checked for completeness when built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refit.plan import proof
from refit.plan.box import Box
from refit.plan.box_array import BoolArray, BoxArray, IntArray
from refit.plan.pieces import ZEROS
from refit.plan.sharding import Sharding, TensorSpec
from refit.plan.tensor_class import TensorClass


@dataclass(frozen=True, slots=True)
class Transfer:
    """`box` of a tensor, read on rank `source` and written on rank `destination`. On one rank it is a local copy."""

    tensor: TensorSpec
    source_dtype: str
    box: Box
    source: int
    destination: int

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
    """Routes as columns: route `i` moves `boxes[i]` of class `classes[tensor_class[i]]` from `source[i]`.

    Dim 0 of a box counts the tensors of its class, so a route stands for a transfer of each of them. The routes of all
    ranks are then as many as ranks and geometries make them, and only `for_rank` and `transfers` list transfers.

    Shapes: tensor_class, source, destination `[num_routes]`; the boxes have `max_dims` dims, where classes with fewer
    have trailing offsets 0 and ends 1. The constructor raises PlanError unless every destination element is written
    exactly once and every read lies inside a box that its source holds.
    """

    source_sharding: Sharding
    destination_sharding: Sharding
    classes: tuple[TensorClass, ...]
    tensor_class: IntArray
    source: IntArray
    destination: IntArray
    boxes: BoxArray

    def __post_init__(self) -> None:
        proof.check(self)

    def __len__(self) -> int:
        return len(self.tensor_class)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of both sides, ascending."""
        return tuple(sorted({*self.source_sharding.ranks, *self.destination_sharding.ranks}))

    @cached_property
    def nbytes(self) -> IntArray:
        """Bytes each route writes, `[num_routes]`."""
        itemsizes = np.array([each.itemsize for each in self.classes], np.int64)
        return self.boxes.volumes * itemsizes[self.tensor_class]

    @property
    def num_transfers(self) -> int:
        """Wire transfers and local copies."""
        return int(self.boxes.extents[self.source != ZEROS, 0].sum())

    @property
    def is_local(self) -> BoolArray:
        return np.equal(self.source, self.destination)

    @property
    def is_wire(self) -> BoolArray:
        """Routes that leave their source rank."""
        return np.not_equal(self.source, self.destination) & np.not_equal(self.source, ZEROS)

    def transfers(self, routes: IntArray | None = None) -> Iterator[Transfer]:
        """The transfers of all routes, or of those with the indices `routes`, in plan order.

        That is the order of the destination's tensors, then of the boxes' offsets, then of the destination rank.
        """
        routes = np.arange(len(self)) if routes is None else routes
        boxes, classes = self.boxes[routes], self.tensor_class[routes]
        counts = boxes.extents[:, 0]
        row = np.repeat(np.arange(len(routes)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - boxes.offsets[:, 0], counts)
        number = self._first_tensor[classes[row]] + place
        by_offsets = [boxes.offsets[row, dim] for dim in reversed(range(1, boxes.dims))]
        order = np.lexsort((self.destination[routes[row]], *by_offsets, self._position[number]))
        parts = [_tensor_box(boxes, each, self.classes[classes[each]].dims) for each in range(len(routes))]
        sources, destinations = self.source[routes].tolist(), self.destination[routes].tolist()
        for each, tensor in zip(row[order].tolist(), number[order].tolist(), strict=True):
            spec, source = self._tensors[tensor], sources[each]
            dtype = spec.dtype if source == ZEROS else self.source_sharding.tensors[spec.key].dtype
            yield Transfer(spec, dtype, parts[each], source, destinations[each])

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
        for column in (self.tensor_class, self.source, self.destination, self.boxes.offsets, self.boxes.ends):
            sha.update(np.ascontiguousarray(column).data)
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
