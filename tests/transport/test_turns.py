"""The order in which ranks serve their destinations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refit.transport.turns import send_turns


def test_two_sources_of_the_same_two_destinations_begin_with_different_ones() -> None:
    turns = send_turns(np.array([[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert turns == {0: [2, 3], 1: [3, 2]}


def test_a_source_begins_with_the_destination_that_has_most_to_receive() -> None:
    turns = send_turns(np.array([[9, 5, 0, 1], [2, 3, 4, 0], [0, 4, 3, 2], [1, 0, 5, 9]]))
    assert turns == {0: [1, 3], 1: [2, 0], 2: [3, 1], 3: [0, 2]}


def test_all_to_all_gives_every_turn_one_source_per_destination() -> None:
    turns = send_turns(np.ones((4, 4), np.int64))
    assert [len(set(step)) for step in zip(*turns.values(), strict=True)] == [4, 4, 4]


@given(st.integers(1, 7), st.data())
def test_every_pair_has_one_turn(num_ranks: int, data: st.DataObject) -> None:
    cells = st.lists(st.integers(0, 5), min_size=num_ranks**2, max_size=num_ranks**2)
    matrix = np.array(data.draw(cells), np.int64).reshape(num_ranks, num_ranks)
    before = matrix.copy()
    pairs = {(source, peer) for source, peers in send_turns(matrix).items() for peer in peers}
    assert pairs == {(s, d) for s in range(num_ranks) for d in range(num_ranks) if s != d and matrix[s, d]}
    assert (matrix == before).all()
