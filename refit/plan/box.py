"""Boxes: axis-aligned blocks of a global tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements `offsets[d] <= index[d] < offsets[d] + extents[d]` of a global tensor, for every dim `d`."""

    offsets: tuple[int, ...]
    extents: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), shape)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + e for o, e in zip(self.offsets, self.extents, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a box of a scalar."""
        return math.prod(self.extents)

    def contains(self, other: Box) -> bool:
        return all(
            a <= b and c >= d for a, b, c, d in zip(self.offsets, other.offsets, self.ends, other.ends, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The common elements, or None where there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        extents = tuple(min(a, b) - o for a, b, o in zip(self.ends, other.ends, offsets, strict=True))
        return None if any(e <= 0 for e in extents) else Box(offsets, extents)

    def subtract(self, other: Box) -> list[Box]:
        """What is left of this box without `other`, as disjoint boxes (none if `other` covers it)."""
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
        """At most `count` boxes of nearly equal size that cut this one along its first dim of more than one element."""
        dim = self.leading_dim
        if dim is None or count <= 1:
            yield self
            return
        size = self.extents[dim]
        parts = min(count, size)
        cuts = [self.offsets[dim] + size * part // parts for part in range(parts + 1)]
        for begin, end in itertools.pairwise(cuts):
            yield self.narrow(dim, begin, end)

    @property
    def leading_dim(self) -> int | None:
        """The first dim of more than one element, or None for a single element."""
        return next((dim for dim, extent in enumerate(self.extents) if extent > 1), None)

    def slices_within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that pick this box from an array holding exactly `outer`, of shape `outer.extents`."""
        return tuple(slice(o - b, o - b + e) for o, b, e in zip(self.offsets, outer.offsets, self.extents, strict=True))

    def is_contiguous_within(self, outer: Box) -> bool:
        """Whether this box is one run of memory in a row-major array that holds exactly `outer`."""
        dim = self.leading_dim
        if dim is None:
            return True
        return self.extents[dim + 1 :] == outer.extents[dim + 1 :]


def coalesce(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Merge disjoint boxes that touch along one dim and agree in all others; sorted, same elements.

    Greedy from the last dim to the first, which rejoins whatever cutting along one dim at a time has made.
    """
    merged = sorted(boxes)
    for dim in reversed(range(len(merged[0].offsets) if merged else 0)):
        merged = _coalesce_along(dim, merged)
    return tuple(sorted(merged))


def _coalesce_along(dim: int, boxes: list[Box]) -> list[Box]:
    def elsewhere(box: Box) -> tuple[tuple[int, ...], ...]:
        return (box.offsets[:dim] + box.offsets[dim + 1 :], box.extents[:dim] + box.extents[dim + 1 :])

    merged: list[Box] = []
    for box in sorted(boxes, key=lambda b: (elsewhere(b), b.offsets[dim])):
        last = merged[-1] if merged else None
        if last is not None and elsewhere(last) == elsewhere(box) and last.ends[dim] == box.offsets[dim]:
            merged[-1] = last.narrow(dim, last.offsets[dim], box.ends[dim])
        else:
            merged.append(box)
    return merged
