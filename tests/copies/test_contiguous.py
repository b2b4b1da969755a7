"""Contiguous copies are merged with their neighbours, and nothing is copied twice or left out."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from refit.copies.batch import CopyBatch
from refit.copies.contiguous import split_runs
from refit.copies.copy import Copy


def _rows(source: torch.Tensor, target: torch.Tensor, rows: list[int], shift: int = 0) -> list[Copy]:
    return [Copy(target[row + shift], source[row]) for row in rows]


def test_neighbours_at_both_ends_become_one_run() -> None:
    source, target = torch.arange(60.0).view(6, 10), torch.zeros(7, 10)
    split = split_runs(_rows(source, target, [2, 0, 1, 4], shift=1), least_bytes=80)
    assert [run.nbytes for run in split.runs] == [120]
    assert [copy.nbytes for copy in split.others] == [40]


def test_neighbours_at_one_end_only_stay_apart() -> None:
    source, target = torch.arange(60.0).view(6, 10), torch.zeros(6, 10)
    swapped = [Copy(target[0], source[1]), Copy(target[1], source[0])]
    assert split_runs(swapped, least_bytes=41).runs == []
    apart = [Copy(torch.zeros(10), source[0]), Copy(torch.zeros(10), source[1])]
    assert split_runs(apart, least_bytes=41).runs == []


def test_strided_copies_and_casts_are_no_runs() -> None:
    source, target = torch.arange(60.0).view(6, 10), torch.zeros(6, 10)
    copies = [Copy(target[:, :5], source[:, :5]), Copy(torch.zeros(10, dtype=torch.bfloat16), source[0])]
    split = split_runs(copies, least_bytes=1)
    assert split.runs == []
    assert len(split.others) == 2


@given(st.permutations(range(12)), st.integers(1, 600))
def test_a_batch_with_runs_copies_what_a_batch_without_does(places: list[int], least_bytes: int) -> None:
    source, target = torch.arange(120.0).view(12, 10), torch.zeros(12, 10)
    CopyBatch([Copy(target[place], source[row]) for row, place in enumerate(places)], engine_bytes=least_bytes).run()
    assert torch.equal(target[places], source)
