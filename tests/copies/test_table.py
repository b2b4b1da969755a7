"""The worked example of `refit.copies.table`, and spans that divide evenly. Kernel tests cover all other layouts."""

from __future__ import annotations

import numpy as np
import torch

from refit.copies.copy import Copy
from refit.copies.table import Dim, Runs, _even_spans, build_tables, runs_of, tiles_of


def test_the_first_columns_of_a_wider_matrix() -> None:
    runs = runs_of((4, 6), (6, 1), (8, 1), 2)
    assert runs == Runs((Dim(4, destination=12, source=16),), width=12)
    assert tiles_of(runs, word=4, tile_bytes=24).tolist() == [[0, 0, 2, 3, 4, 3], [32, 24, 2, 3, 4, 3]]


def test_the_widest_word_that_all_distances_allow() -> None:
    memory = torch.zeros(128, dtype=torch.bfloat16)
    start = -memory.data_ptr() // 2 % 8  # to a multiple of 16 bytes
    source = memory[start : start + 32].view(4, 8)[:, :6]
    destination = memory[start + 32 : start + 56].view(4, 6)
    (word,) = build_tables([Copy(destination, source)])
    assert word == 4


def test_spans_are_as_even_as_their_multiple_allows() -> None:
    for total, longest, multiple, wanted in ((10, 4, 2, [4, 4, 2]), (10, 4, 1, [4, 4, 2]), (9, 4, 1, [3, 3, 3])):
        starts, lengths = _even_spans(total, longest, multiple)
        assert lengths.tolist() == wanted
        assert starts.tolist() == np.cumsum([0, *wanted[:-1]]).tolist()
