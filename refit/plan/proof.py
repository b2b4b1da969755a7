"""The proof that a plan is complete. `RefitPlan` runs it when it is built, on its columns alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from refit.errors import PlanError
from refit.plan.box_array import BoolArray, BoxArray, Grouped, IntArray
from refit.plan.sharding import TensorSharding
from refit.plan.tensor_class import TensorClass


class Routes(Protocol):
    """The columns of a RefitPlan."""

    @property
    def classes(self) -> tuple[TensorClass, ...]: ...
    @property
    def tensor_class(self) -> IntArray: ...
    @property
    def source(self) -> IntArray: ...
    @property
    def destination(self) -> IntArray: ...
    @property
    def boxes(self) -> BoxArray: ...


def check(plan: Routes) -> None:
    """Raise PlanError unless every destination element is written exactly once, with an element that its source holds.

    Writes inside the held boxes that are disjoint and have the volume that is held cover everything.
    """
    _check_held(plan)
    _check_disjoint(plan)
    _check_volumes(plan)


def _check_held(plan: Routes) -> None:
    """Raise PlanError unless every read and every write lies inside one box that its rank holds."""
    for number, routes in _routes_by_class(plan):
        tensors = plan.classes[number]
        boxes = plan.boxes[routes]
        exists = (boxes.offsets[:, 0] >= 0) & (boxes.ends[:, 0] <= len(tensors.tensors)) & (boxes.extents > 0).all(1)
        if not exists.all():
            raise PlanError(f"{_text(plan, int(routes[~exists][0]))} is not a part of its tensors")
        parts = BoxArray(boxes.offsets[:, 1 : tensors.dims], boxes.ends[:, 1 : tensors.dims])
        for verb, sharding, ranks in (
            ("read", tensors.source, plan.source[routes]),
            ("written", tensors.destination, plan.destination[routes]),
        ):
            held = (ranks < 0) | _is_held(sharding, ranks, parts)
            if not held.all():
                route = int(routes[~held][0])
                rank = int(ranks[~held][0])
                raise PlanError(f"{_text(plan, route)} is {verb} on rank {rank}, which does not hold it")


def _routes_by_class(plan: Routes) -> Iterator[tuple[int, IntArray]]:
    order = np.argsort(plan.tensor_class, kind="stable")
    bounds = np.searchsorted(plan.tensor_class[order], np.arange(len(plan.classes) + 1))
    for number in range(len(plan.classes)):
        yield number, order[bounds[number] : bounds[number + 1]]


def _is_held(sharding: TensorSharding, ranks: IntArray, parts: BoxArray) -> BoolArray:
    """For each row, whether one box that `ranks[row]` holds contains `parts[row]`."""
    by_rank = np.argsort(sharding.holders.rank, kind="stable")
    holders, boxes = sharding.holders.rank[by_rank], sharding.boxes[sharding.holders.box[by_rank]]
    first = np.searchsorted(holders, ranks)
    counts = np.searchsorted(holders, ranks, side="right") - first
    inside = np.zeros(len(ranks), np.bool_)
    # A rank holds few boxes of one tensor (two for gate and up): compare the k-th box of all rows at once.
    for k in range(int(counts.max(initial=0))):
        rows = np.flatnonzero((counts > k) & ~inside)
        inside[rows] = parts[rows].within(boxes[first[rows] + k])
    return inside


def _check_disjoint(plan: Routes) -> None:
    """Raise PlanError where two writes to the same tensor on the same rank overlap.

    Writes that make up a larger box are merged first. What is left are few per rank, mostly the boxes that it holds.
    """
    num_ranks = 1 + _highest_rank(plan)
    writes = Grouped(plan.tensor_class * num_ranks + plan.destination, plan.boxes).merged()
    order = np.argsort(writes.groups, kind="stable")
    groups, boxes = writes.groups[order], writes.boxes[order]
    # Compare every row with its k-th successor, until no two rows that far apart share a group.
    rows = np.arange(len(order))
    for k in range(1, len(order)):
        rows = rows[rows < len(order) - k]
        rows = rows[groups[rows] == groups[rows + k]]
        if not len(rows):
            return
        overlap = (boxes[rows].intersect(boxes[rows + k]).extents > 0).all(1)
        if overlap.any():
            number, rank = divmod(int(groups[rows[overlap][0]]), num_ranks)
            tensors, box = plan.classes[number], boxes.box(int(rows[overlap][0]))
            raise PlanError(f"{tensors.tensors[box.offsets[0]].key} is written twice on rank {rank}")


def _check_volumes(plan: Routes) -> None:
    """Raise PlanError unless the writes to each class on each rank have the volume that the rank holds."""
    shape = (len(plan.classes), 1 + _highest_rank(plan))
    written, held = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    np.add.at(written, (plan.tensor_class, plan.destination), plan.boxes.volumes)
    for number, each in enumerate(plan.classes):
        holders = each.destination.holders
        np.add.at(held[number], holders.rank, each.destination.boxes.volumes[holders.box] * len(each.tensors))
    if (written != held).any():
        number, rank = np.argwhere(written != held)[0].tolist()
        tensors = plan.classes[number].tensors
        others = f" and {len(tensors) - 1} more like it" if len(tensors) > 1 else ""
        raise PlanError(
            f"{tensors[0].key}{others} on rank {rank}: {written[number, rank]} of {held[number, rank]} elements are "
            "written"
        )


def _highest_rank(plan: Routes) -> int:
    """The highest rank of the destination."""
    return max(int(each.destination.holders.rank.max(initial=0)) for each in plan.classes)


def _text(plan: Routes, route: int) -> str:
    tensors, box = plan.classes[int(plan.tensor_class[route])], plan.boxes.box(route)
    key = tensors.tensors[min(max(box.offsets[0], 0), len(tensors.tensors) - 1)].key
    return f"{key} at {box.offsets[1 : tensors.dims]}+{box.extents[1 : tensors.dims]}"
