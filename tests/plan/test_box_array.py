"""Boxes as arrays, against the same on Box."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refit.plan.box import Box
from refit.plan.box_array import BoxArray, Grouped, numbered, numbered_by_sorting, touching


@st.composite
def boxes(draw: st.DrawFn, dims: int) -> list[Box]:
    offsets = st.tuples(*[st.integers(0, 6)] * dims)
    extents = st.tuples(*[st.integers(1, 4)] * dims)
    return draw(st.lists(st.builds(Box, offsets, extents), min_size=1, max_size=12))


@given(st.integers(0, 3).flatmap(lambda dims: st.tuples(st.just(dims), boxes(dims), boxes(dims))))
def test_touching_finds_every_pair_that_shares_elements(case: tuple[int, list[Box], list[Box]]) -> None:
    dims, left, right = case
    found = list(
        zip(*(side.tolist() for side in touching(BoxArray.of(left, dims), BoxArray.of(right, dims))), strict=True)
    )
    assert sorted(found) == [
        (i, j) for i, one in enumerate(left) for j, other in enumerate(right) if one.intersect(other) is not None
    ]
    assert [i for i, _ in found] == sorted(i for i, _ in found)


def counts(groups: list[int], many: list[Box]) -> np.ndarray:
    """How often the boxes of each group have each element."""
    space = np.zeros((1 + max(groups), 10, 10, 10), np.int64)
    for group, box in zip(groups, many, strict=True):
        space[(group, *(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True)))] += 1
    return space


@given(boxes(3), st.data())
def test_merging_changes_no_element_of_a_group(many: list[Box], data: st.DataObject) -> None:
    """Overlapping boxes included: their common elements stay twofold."""
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(many), max_size=len(many)))
    merged = Grouped(np.array(groups), BoxArray.of(many, 3)).merged()
    after = [merged.boxes.box(row) for row in range(len(merged.boxes))]
    assert len(after) <= len(many)
    assert (counts([*merged.groups.tolist(), 2], [*after, Box.whole((1, 1, 1))])
            == counts([*groups, 2], [*many, Box.whole((1, 1, 1))])).all()  # fmt: skip


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_a_grid_of_cuts_is_rejoined(planes: int, rows: int, columns: int, random) -> None:
    cells = [Box((i, 2 * j, 3 * k), (1, 2, 3)) for i in range(planes) for j in range(rows) for k in range(columns)]
    random.shuffle(cells)
    merged = Grouped(np.zeros(len(cells), np.int64), BoxArray.of(cells, 3)).merged()
    assert len(merged.boxes) == 1
    assert merged.boxes.box(0) == Box.whole((planes, 2 * rows, 3 * columns))


@given(st.lists(st.integers(-3, 9), max_size=40))
def test_keys_are_numbered_as_numpy_does(values: list[int]) -> None:
    keys = np.array(values, np.int64)
    expected = [each.tolist() for each in np.unique(keys, return_index=True, return_inverse=True)]
    assert [each.tolist() for each in numbered_by_sorting(keys)] == expected
    if values and min(values) >= 0:
        assert [each.tolist() for each in numbered(keys, 10)] == expected
