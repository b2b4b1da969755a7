"""Boxes: axis-aligned blocks of a global tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import add, ge, le, sub


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements of a global tensor with `offsets[d] <= index[d] < offsets[d] + extents[d]` for every dim `d`."""

    offsets: tuple[int, ...]
    extents: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), shape)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(map(add, self.offsets, self.extents))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a box of a scalar."""
        return math.prod(self.extents)

    def contains(self, other: Box) -> bool:
        return all(map(le, self.offsets, other.offsets)) and all(map(ge, self.ends, other.ends))

    def intersect(self, other: Box) -> Box | None:
        """The box of the common elements; None where there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        extents = tuple(map(sub, map(min, self.ends, other.ends), offsets))
        return Box(offsets, extents) if min(extents, default=1) > 0 else None

    def subtract(self, other: Box) -> list[Box]:
        """The elements of this box that are not in `other`, as disjoint boxes."""
        common = self.intersect(other)
        if common is None:
            return [self]
        rest, core = [], self
        for dim in range(len(self.offsets)):
            begin, end = common.offsets[dim], common.ends[dim]
            if core.offsets[dim] < begin:
                rest.append(core.narrow(dim, core.offsets[dim], begin))
            if end < core.ends[dim]:
                rest.append(core.narrow(dim, end, core.ends[dim]))
            core = core.narrow(dim, begin, end)
        return rest

    def narrow(self, dim: int, begin: int, end: int) -> Box:
        """This box with dim `dim` reduced to the global interval [begin, end)."""
        offsets, extents = list(self.offsets), list(self.extents)
        offsets[dim], extents[dim] = begin, end - begin
        return Box(tuple(offsets), tuple(extents))

    def split(self, count: int) -> Iterator[Box]:
        """Cut this box along its leading dim into at most `count` boxes of nearly equal size."""
        dim = self.leading_dim
        if dim is None or count <= 1:
            yield self
            return
        size = self.extents[dim]
        parts = min(count, size)
        cuts = [self.offsets[dim] + size * part // parts for part in range(parts + 1)]
        for begin, end in itertools.pairwise(cuts):
            yield self.narrow(dim, begin, end)

    def stretch(self, begin: int, end: int) -> Iterator[Box]:
        """The elements number `begin` to `end` (exclusive) of this box in row-major order, as few boxes, in order."""
        dim = self.leading_dim
        if begin >= end:
            return
        if dim is None:
            yield self
            return
        size, offset = self.volume // self.extents[dim], self.offsets[dim]
        first, last = -(-begin // size), end // size
        if first > last:  # within one index of the dim
            yield from self.narrow(dim, offset + last, offset + first).stretch(begin - last * size, end - last * size)
            return
        if begin < first * size:
            yield from self.narrow(dim, offset + first - 1, offset + first).stretch(begin - (first - 1) * size, size)
        if first < last:
            yield self.narrow(dim, offset + first, offset + last)
        if last * size < end:
            yield from self.narrow(dim, offset + last, offset + last + 1).stretch(0, end - last * size)

    @property
    def leading_dim(self) -> int | None:
        """The first dim with more than one element; None for a box of one element."""
        return next((dim for dim, extent in enumerate(self.extents) if extent > 1), None)

    def slices_within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that select this box in an array of shape `outer.extents` that holds `outer`."""
        return tuple(slice(o - b, o - b + e) for o, b, e in zip(self.offsets, outer.offsets, self.extents, strict=True))

    def is_contiguous_within(self, outer: Box) -> bool:
        """Whether this box is contiguous in a row-major array of shape `outer.extents` that holds `outer`."""
        dim = self.leading_dim
        if dim is None:
            return True
        return self.extents[dim + 1 :] == outer.extents[dim + 1 :]


def coalesce(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Merge disjoint boxes that touch along one dim and agree in all others. The result is sorted.

    Goes from the last dim to the first. That rejoins boxes that were cut along one dim after another.
    """
    merged = sorted(boxes)
    for dim in reversed(range(len(merged[0].offsets) if merged else 0)):
        merged = _coalesce_along(dim, merged)
    return tuple(sorted(merged))


def _coalesce_along(dim: int, boxes: list[Box]) -> list[Box]:
    def other_dims(box: Box) -> tuple[tuple[int, ...], ...]:
        return (box.offsets[:dim] + box.offsets[dim + 1 :], box.extents[:dim] + box.extents[dim + 1 :])

    merged: list[Box] = []
    for box in sorted(boxes, key=lambda b: (other_dims(b), b.offsets[dim])):
        last = merged[-1] if merged else None
        if last is not None and other_dims(last) == other_dims(box) and last.ends[dim] == box.offsets[dim]:
            merged[-1] = last.narrow(dim, last.offsets[dim], box.ends[dim])
        else:
            merged.append(box)
    return merged
