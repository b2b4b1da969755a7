"""Many boxes of one tensor as arrays: which touch, where they meet, and merging those that make up larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from refit.plan.box import Box

IntArray: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[np.signedinteger]
"""Integers of any width: there may be a million times as many as there are ranks."""
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BoxArray:
    """Boxes with as many dims: `offsets` and `ends` are `[num_boxes, dims]`."""

    offsets: IntArray
    ends: IntArray

    @classmethod
    def of(cls, boxes: Sequence[Box], dims: int) -> BoxArray:
        shape = (len(boxes), dims)
        return cls(
            np.array([box.offsets for box in boxes], np.int64).reshape(shape),
            np.array([box.ends for box in boxes], np.int64).reshape(shape),
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: Column | BoolArray | slice) -> BoxArray:
        return BoxArray(self.offsets[rows], self.ends[rows])

    @property
    def distinct(self) -> BoxArray:
        """See `RepeatedBoxes`."""
        return self

    @property
    def number(self) -> Column:
        """See `RepeatedBoxes`."""
        return np.arange(len(self), dtype=np.int32)

    @property
    def expanded(self) -> BoxArray:
        """See `RepeatedBoxes`."""
        return self

    @property
    def dims(self) -> int:
        return int(self.offsets.shape[1])

    @property
    def extents(self) -> IntArray:
        return self.ends - self.offsets

    @property
    def volumes(self) -> IntArray:
        """Elements of each box, `[num_boxes]`."""
        return np.asarray(self.extents.prod(axis=1), np.int64)

    def box(self, row: int) -> Box:
        return Box(tuple(self.offsets[row].tolist()), tuple(self.extents[row].tolist()))

    def joined(self, other: BoxArray) -> BoxArray:
        """These boxes and then `other`'s."""
        return BoxArray(np.concatenate([self.offsets, other.offsets]), np.concatenate([self.ends, other.ends]))

    def intersect(self, other: BoxArray) -> BoxArray:
        """Row by row the common elements. They may be none: extents of 0 and below."""
        return BoxArray(np.maximum(self.offsets, other.offsets), np.minimum(self.ends, other.ends))

    def within(self, other: BoxArray) -> BoolArray:
        """Row by row whether `other`'s box contains this one's, `[num_boxes]`."""
        return np.asarray(((self.offsets >= other.offsets) & (self.ends <= other.ends)).all(axis=1))


@dataclass(frozen=True, slots=True)
class RepeatedBoxes:
    """Boxes of which many are equal: box `i` is `distinct[number[i]]`.

    Thousands of ranks may need a box, and there it is once. What is asked of boxes one by one is asked of `distinct`.
    """

    distinct: BoxArray
    number: Column

    @classmethod
    def concatenated(cls, parts: Sequence[Boxes]) -> RepeatedBoxes:
        """The boxes of all `parts`, one or more, in turn."""
        first = np.cumsum([0, *(len(part.distinct) for part in parts)])
        return cls(
            BoxArray(
                np.concatenate([part.distinct.offsets for part in parts]),
                np.concatenate([part.distinct.ends for part in parts]),
            ),
            np.concatenate(
                [part.number + np.int32(begin) for part, begin in zip(parts, first[:-1].tolist(), strict=True)],
                dtype=np.int32,
            ),
        )

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, rows: Column | BoolArray | slice) -> RepeatedBoxes:
        return RepeatedBoxes(self.distinct, self.number[rows])

    @property
    def dims(self) -> int:
        return self.distinct.dims

    @property
    def expanded(self) -> BoxArray:
        return self.distinct[self.number]

    @property
    def offsets(self) -> IntArray:
        return self.distinct.offsets[self.number]

    @property
    def ends(self) -> IntArray:
        return self.distinct.ends[self.number]

    @property
    def extents(self) -> IntArray:
        return self.distinct.extents[self.number]

    @property
    def volumes(self) -> IntArray:
        """Elements of each box, `[num_boxes]`."""
        return self.distinct.volumes[self.number]

    def box(self, row: int) -> Box:
        return self.distinct.box(int(self.number[row]))


Boxes: TypeAlias = BoxArray | RepeatedBoxes


def touching(left: BoxArray, right: BoxArray) -> tuple[IntArray, IntArray]:
    """All pairs of rows (of `left`, of `right`) whose boxes share elements, ordered by the row of `left`.

    Sorts `right` along the dim that leaves the fewest candidates and compares those, not all pairs.
    """
    rows = np.arange(len(left))
    order, first, counts = np.arange(len(right)), np.zeros_like(rows), np.full_like(rows, len(right))
    for dim in range(left.dims):
        by_offset = np.argsort(right.offsets[:, dim], kind="stable")
        # Boxes may overlap: the largest end so far ascends as the offsets do.
        reached = np.maximum.accumulate(right.ends[by_offset, dim])
        begin = np.searchsorted(reached, left.offsets[:, dim], side="right")
        end = np.searchsorted(right.offsets[by_offset, dim], left.ends[:, dim], side="left")
        if np.maximum(end - begin, 0).sum() < counts.sum():
            order, first, counts = by_offset, begin, np.maximum(end - begin, 0)
    i, j = np.repeat(rows, counts), order[ranges(first, counts)]
    shared = (left[i].intersect(right[j]).extents > 0).all(axis=1)
    return i[shared], j[shared]


def ranges(first: IntArray, counts: IntArray) -> IntArray:
    """`first[i], first[i] + 1, ...`, `counts[i]` numbers, for every `i` in turn."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(before - first, counts)


def numbered(keys: IntArray, num_keys: int) -> tuple[IntArray, IntArray, Column]:
    """The distinct ones of `keys`, which are below `num_keys`, ascending; where each occurs first; and of each of
    `keys`, which of the distinct ones it is.

    Found by sorting, or in tables where they are no larger than a few times `keys`.
    """
    if num_keys > 8 * len(keys):
        return numbered_by_sorting(keys)
    table = np.full(num_keys, -1, np.int32)
    table[keys[::-1]] = np.arange(len(keys), dtype=np.int32)[::-1]  # the last one assigned stays, here the first
    found = np.flatnonzero(table >= 0)
    first = table[found].astype(np.int64)
    table[found] = np.arange(len(found), dtype=np.int32)
    return found, first, table[keys]


def numbered_by_sorting(keys: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """As `numbered`, for any keys.

    `np.unique` does this too, and imports numpy.ma when it is first called, which takes longer than most plans.
    """
    order = np.argsort(keys, kind="stable")
    ascending = keys[order]
    begins = np.ones(len(keys), np.bool_)
    begins[1:] = ascending[1:] != ascending[:-1]
    which = np.empty(len(keys), np.int64)
    which[order] = np.cumsum(begins) - 1
    return ascending[begins], order[begins], which


@dataclass(frozen=True, slots=True)
class Grouped:
    """Boxes in groups: `groups` `[num_boxes]` numbers each box's."""

    groups: IntArray
    boxes: BoxArray

    def merged(self) -> Grouped:
        """Merge boxes of a group that touch along one dim and agree in all others, until none do.

        A merged box has the elements of its parts and no others, each as often as the parts have it. Boxes that were
        cut along one dim after another are rejoined.
        """
        together = np.bincount(self.groups)[self.groups] > 1
        alone = Grouped(self.groups[~together], self.boxes[~together])
        rest = Grouped(self.groups[together], self.boxes[together])
        before = -1
        while before != len(rest.groups):
            before = len(rest.groups)
            for dim in reversed(range(rest.boxes.dims)):
                rest = rest._merged_along(dim)
        return Grouped(np.concatenate([alone.groups, rest.groups]), alone.boxes.joined(rest.boxes))

    def _merged_along(self, dim: int) -> Grouped:
        if not len(self.groups):
            return self
        others = [d for d in range(self.boxes.dims) if d != dim]
        agree = np.column_stack([self.groups, self.boxes.offsets[:, others], self.boxes.ends[:, others]])
        # Sort by a hash of what must agree. Equal hashes of unequal rows cost a merge, never a wrong one.
        with np.errstate(over="ignore"):
            hashes = (agree * _ODD[: agree.shape[1]]).sum(axis=1)
        order = np.lexsort((self.boxes.offsets[:, dim], hashes))
        agree, boxes = agree[order], self.boxes[order]
        starts = np.ones(len(order), np.bool_)
        starts[1:] = (agree[1:] != agree[:-1]).any(axis=1) | (boxes.offsets[1:, dim] != boxes.ends[:-1, dim])
        ends = boxes.ends[starts]
        last = np.append(np.flatnonzero(starts)[1:], len(order)) - 1
        ends[:, dim] = boxes.ends[last, dim]
        return Grouped(self.groups[order][starts], BoxArray(boxes.offsets[starts], ends))


_ODD = np.random.default_rng(0).integers(1 << 40, 1 << 62, 64) | 1
"""Factors of a hash of at most 64 columns."""
