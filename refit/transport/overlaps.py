"""Overlaps: values filed under boxes of tensors, found again by any box that shares elements with theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Generic, TypeVar

from refit.plan.box import Box

T = TypeVar("T")


class Overlaps(Generic[T]):
    """Boxes with values.

    Boxes of one index of dim 0, as all of a stacked tensor are, are filed under it: a search for one of hundreds of
    experts then meets that expert's boxes alone.
    """

    def __init__(self) -> None:
        self._filed: dict[str, dict[int | None, list[tuple[Box, T]]]] = defaultdict(lambda: defaultdict(list))

    def add(self, key: str, box: Box, value: T) -> None:
        self._filed[key][_index(box)].append((box, value))

    def find(self, key: str, box: Box) -> Iterator[T]:
        """The values of all boxes of tensor `key` that share elements with `box`, one for each such box."""
        if key not in self._filed:
            return
        filed, index = self._filed[key], _index(box)
        for place in tuple(filed) if index is None else (index, None):
            yield from (value for other, value in filed.get(place, ()) if other.intersect(box) is not None)


def _index(box: Box) -> int | None:
    """The index of dim 0 that all elements of `box` have; None where they have several, or no dim."""
    return box.offsets[0] if box.extents and box.extents[0] == 1 else None
