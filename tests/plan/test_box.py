from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refit.plan.box import Box, coalesce


@st.composite
def boxes(draw: st.DrawFn, dims: int = 2) -> Box:
    offsets = tuple(draw(st.integers(0, 6)) for _ in range(dims))
    return Box(offsets, tuple(draw(st.integers(1, 6)) for _ in range(dims)))


def mask(*many: Box, dims: int = 2) -> np.ndarray:
    """How many of the boxes each cell of a 12 x 12 grid lies in."""
    grid = np.zeros((12,) * dims, int)
    for box in many:
        grid[box.slices_within(Box.whole(grid.shape))] += 1
    return grid


@given(boxes(), boxes())
def test_intersection_and_difference_divide_the_box(a: Box, b: Box) -> None:
    common = a.intersect(b)
    parts = a.subtract(b) + ([common] if common else [])
    assert (mask(*parts) == mask(a)).all()
    assert (common is not None) == bool((mask(a) & mask(b)).any())


@given(boxes(dims=3), st.integers(1, 9))
def test_split_cuts_into_disjoint_parts_that_cover(box: Box, count: int) -> None:
    parts = list(box.split(count))
    assert len(parts) <= count
    assert (mask(*parts, dims=3) == mask(box, dims=3)).all()


@given(boxes(dims=3), st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_coalesce_rejoins_a_grid(box: Box, rows: int, columns: int, random) -> None:
    parts = [cell for strip in box.split(rows) for cell in _split_last(strip, columns)]
    random.shuffle(parts)
    assert coalesce(parts) == (box,)


def _split_last(box: Box, parts: int) -> list[Box]:
    dim, size = len(box.offsets) - 1, box.extents[-1]
    cuts = sorted({box.offsets[dim] + size * part // parts for part in range(parts + 1)})
    return [box.narrow(dim, begin, end) for begin, end in itertools.pairwise(cuts)]


@given(st.lists(boxes(), max_size=6))
def test_coalesce_changes_no_element(many: list[Box]) -> None:
    disjoint: list[Box] = []
    for box in many:
        rest = [box]
        for other in disjoint:
            rest = [part for piece in rest for part in piece.subtract(other)]
        disjoint += rest
    assert (mask(*coalesce(disjoint)) == mask(*disjoint)).all()
    assert len(coalesce(disjoint)) <= len(disjoint)


@given(boxes(dims=3), boxes(dims=3))
def test_contiguity_is_numpys(inner: Box, outer: Box) -> None:
    box = outer.intersect(inner)
    if box is not None:
        array = np.zeros(outer.extents)
        assert box.is_contiguous_within(outer) == array[box.slices_within(outer)].flags.c_contiguous


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
def test_a_stretch_has_the_elements_of_its_numbers(shape: list[int], data: st.DataObject) -> None:
    whole = Box(tuple(range(len(shape))), tuple(shape))
    begin = data.draw(st.integers(0, whole.volume))
    end = data.draw(st.integers(begin, whole.volume))
    numbers = np.arange(whole.volume).reshape(shape)
    parts = list(whole.stretch(begin, end))
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    assert [n for part in parts for n in numbers[part.slices_within(whole)].ravel()] == list(range(begin, end))
