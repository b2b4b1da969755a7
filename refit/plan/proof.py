"""The proof that a plan is complete. `RefitPlan` runs it when it is built, on its columns alone.

Stage k moves weights from the sharding S_k to S_k+1. The proof goes by induction over the stages. What stage k reads,
ranks hold in S_k: for k = 0 the source, else what the stages before have delivered, as has been shown by then. What the
stages up to k write lies in the boxes of S_k+1, is disjoint, and has their volume: so it is all of S_k+1, each element
once. No element is written again by a later stage, so it may be read from the moment it is there.

Where thousands of ranks need the same, routes are many and the questions few: whether ranks that hold the same boxes
hold a box is asked once for all of them, and whether writes to a rank overlap once for all ranks that get the same
boxes. What is compared for that is compared in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from refit.errors import PlanError
from refit.plan.box_array import (
    BoolArray,
    BoxArray,
    Boxes,
    Column,
    Grouped,
    IntArray,
    RepeatedBoxes,
    numbered,
    numbered_by_sorting,
    ranges,
)
from refit.plan.sharding import TensorSharding
from refit.plan.tensor_class import TensorClass


class Routes(Protocol):
    """The columns of a RefitPlan."""

    @property
    def num_stages(self) -> int: ...
    @property
    def classes(self) -> tuple[TensorClass, ...]: ...
    @property
    def stage(self) -> Column: ...
    @property
    def tensor_class(self) -> Column: ...
    @property
    def source(self) -> Column: ...
    @property
    def destination(self) -> Column: ...
    @property
    def boxes(self) -> Boxes: ...


def check(plan: Routes) -> None:
    """Raise PlanError unless every destination element is written exactly once, with an element that its source holds.

    Writes inside the held boxes that are disjoint and have the volume that is held cover everything.
    """
    _check_held(plan)
    _check_disjoint(plan)
    for stage in range(plan.num_stages):
        _check_volumes(plan, stage)


def _check_held(plan: Routes) -> None:
    """Raise PlanError unless every read and every write lies inside one box that its rank holds.

    What a stage writes lies in boxes of all shardings from its own on, or what is held after a stage would not be what
    has been written until then.
    """
    known = (plan.stage >= 0) & (plan.stage < plan.num_stages)
    if not known.all():
        route = int(np.flatnonzero(~known)[0])
        raise PlanError(f"{_text(plan, route)} is in stage {plan.stage[route]} of {plan.num_stages}")
    distinct, number_of = plan.boxes.distinct, plan.boxes.number
    for tensor_class, routes in _routes_by_class(plan):
        tensors = plan.classes[tensor_class]
        numbers, ends = number_of[routes], distinct.ends[:, 0] <= len(tensors.tensors)
        exists = ((distinct.offsets[:, 0] >= 0) & ends & (distinct.extents > 0).all(1))[numbers]
        if not exists.all():
            raise PlanError(f"{_text(plan, int(routes[~exists][0]))} is not a part of its tensors")
        dims = slice(1, tensors.dims)
        parts = RepeatedBoxes(BoxArray(distinct.offsets[:, dims], distinct.ends[:, dims]), numbers)
        stage = plan.stage[routes]
        for number, sharding in enumerate(tensors.shardings):
            reads, writes = np.flatnonzero(stage == number), np.flatnonzero(stage < number)
            _check_inside(plan, "read", sharding, plan.source, routes[reads], parts[reads])
            _check_inside(plan, "written", sharding, plan.destination, routes[writes], parts[writes])


def _check_inside(
    plan: Routes, verb: str, sharding: TensorSharding, column: Column, routes: IntArray, parts: RepeatedBoxes
) -> None:
    """Raise PlanError unless the part of each of `routes` lies in one box that its rank in `column` holds."""
    ranks = column[routes]
    held = (ranks < 0) | _is_held(sharding, ranks, parts)
    if not held.all():
        route, rank = int(routes[~held][0]), int(ranks[~held][0])
        when = f" in stage {plan.stage[route]}" if plan.num_stages > 1 else ""
        raise PlanError(f"{_text(plan, route)} is {verb} on rank {rank}{when}, which does not hold it")


def _routes_by_class(plan: Routes) -> Iterator[tuple[int, IntArray]]:
    order = np.argsort(plan.tensor_class, kind="stable")
    bounds = np.searchsorted(plan.tensor_class[order], np.arange(len(plan.classes) + 1))
    for number in range(len(plan.classes)):
        yield number, order[bounds[number] : bounds[number + 1]]


def _is_held(sharding: TensorSharding, ranks: Column, parts: RepeatedBoxes) -> BoolArray:
    """For each row, whether one box that `ranks[row]` holds contains `parts[row]`."""
    kinds, representatives = sharding.kinds
    # Kind 0 holds nothing.
    kind = np.where(ranks < len(kinds), kinds[np.minimum(ranks, len(kinds) - 1)], 0)
    num = len(parts.distinct)
    questions, _, answer = numbered(kind * num + parts.number, len(representatives) * num)
    kind, number = np.divmod(questions, num)
    return _holds(sharding, representatives[kind], parts.distinct[number])[answer]


def _holds(sharding: TensorSharding, ranks: IntArray, parts: BoxArray) -> BoolArray:
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
    num_ranks, num = 1 + _highest_rank(plan), len(plan.boxes.distinct)
    keys = np.multiply(plan.tensor_class, num_ranks * num, dtype=np.int64)
    keys += np.multiply(plan.destination, num, dtype=np.int64)
    keys += plan.boxes.number
    keys.sort()
    keys = _of_representatives(keys, num)
    of, number = np.divmod(keys, num)
    writes = Grouped(of, plan.boxes.distinct[number]).merged()
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
            tensor_class, rank = divmod(int(groups[rows[overlap][0]]), num_ranks)
            tensors, box = plan.classes[tensor_class], boxes.box(int(rows[overlap][0]))
            raise PlanError(f"{tensors.tensors[box.offsets[0]].key} is written twice on rank {rank}")


def _of_representatives(keys: IntArray, num: int) -> IntArray:
    """Of the groups of `keys`, which ascend, one of those with the same numbers: a key is its group x `num` + a number.

    Numbers 3, 5 in group 0, 3, 5 in group 1 and 4 in group 2, with `num` 10: of [3, 5, 13, 15, 24], [3, 5, 24] are
    left. Groups are looked up by a hash, and then compared: equal hashes of unequal groups leave both.
    """
    group = keys // num
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    del group
    numbers = (keys % num).astype(np.int32)
    counts = np.diff(starts, append=len(keys))
    factors = np.random.default_rng(0).integers(1, 1 << 62, num)
    with np.errstate(over="ignore"):
        hashes = np.add.reduceat(factors[numbers], starts) + counts
    _, first, which = numbered_by_sorting(hashes)
    like = first[which]
    alike = np.flatnonzero((counts == counts[like]) & (like != np.arange(len(like))))
    keep = np.ones(len(keys), np.bool_)
    # A few groups at a time, so that what is compared stays small.
    for some in np.array_split(alike, 1 + int(counts[alike].sum()) // COMPARED):
        if not len(some):
            continue
        rows = ranges(starts[some], counts[some])
        same = numbers[rows] == numbers[ranges(starts[like[some]], counts[some])]
        begins = np.cumsum(counts[some]) - counts[some]
        keep[rows] = np.repeat(~np.logical_and.reduceat(same, begins), counts[some])
    return keys[keep]


COMPARED = 1 << 20
"""Numbers of groups that are compared at a time."""


def _check_volumes(plan: Routes, stage: int) -> None:
    """Raise PlanError unless the writes to each class on each rank until the end of `stage` have the volume that the
    rank holds then."""
    shape = (len(plan.classes), 1 + _highest_rank(plan))
    written, held = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    routes = slice(None) if stage == plan.num_stages - 1 else np.flatnonzero(plan.stage <= stage)
    place = np.multiply(plan.tensor_class[routes], shape[1], dtype=np.int64)
    place += plan.destination[routes]
    np.add.at(written.reshape(-1), place, plan.boxes[routes].volumes)
    for number, each in enumerate(plan.classes):
        delivered = each.shardings[stage + 1]
        holders = delivered.holders
        np.add.at(held[number], holders.rank, delivered.boxes.volumes[holders.box] * len(each.tensors))
    if (written != held).any():
        number, rank = np.argwhere(written != held)[0].tolist()
        tensors = plan.classes[number].tensors
        others = f" and {len(tensors) - 1} more like it" if len(tensors) > 1 else ""
        raise PlanError(
            f"{tensors[0].key}{others} on rank {rank}: {written[number, rank]} of {held[number, rank]} elements are "
            f"written{f' by the end of stage {stage}' if plan.num_stages > 1 else ''}"
        )


def _highest_rank(plan: Routes) -> int:
    """The highest rank of the destination."""
    return max(int(sharding.holders.rank.max(initial=0)) for each in plan.classes for sharding in each.shardings[1:])


def _text(plan: Routes, route: int) -> str:
    tensors, box = plan.classes[int(plan.tensor_class[route])], plan.boxes.box(route)
    key = tensors.tensors[min(max(box.offsets[0], 0), len(tensors.tensors) - 1)].key
    return f"{key} at {box.offsets[1 : tensors.dims]}+{box.extents[1 : tensors.dims]}"
