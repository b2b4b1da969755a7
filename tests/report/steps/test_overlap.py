"""Runs that differ in overlap alone are paired, and have a delta where their work is equal."""

from __future__ import annotations

from dataclasses import replace

from refit.report.steps.dispatchers import pairings
from refit.report.steps.overlap import overlap_pairings, overlap_text
from refit.results.outcomes import Outcome
from tests.report.steps.test_dispatchers import ENVIRONMENT, outcome

OVERLAP = {"overlap_moe_expert_parallel_comm": "True"}


def overlapped(arm: str, mean_s: float, micro: int = 1, **changes: object) -> Outcome:
    return outcome(arm, mean_s, micro, overlap=True, **{"config": OVERLAP, **changes})


def test_overlap_is_compared_with_none() -> None:
    cells = [outcome("alltoall", 2.0), overlapped("alltoall", 1.5)]
    (pair,) = overlap_pairings(cells)
    assert (pair.first.overlap, pair.second.overlap) == ("", "overlap")
    assert pair.delta == -0.25
    row = overlap_text(cells).splitlines()[-1].split()
    assert row[2:7] == ["1", "alltoall", "2000.00", "1500.00", "-25.0"]
    assert row[-2:] == ["equal", "overlap"]
    assert pairings(cells) == []


def test_dispatchers_and_micro_batches_are_kept_apart() -> None:
    cells = [make(arm, 1.0, micro) for micro in (4, 1) for arm in ("flex/deepep", "alltoall")
             for make in (overlapped, outcome)]  # fmt: skip
    found = overlap_pairings(cells)
    assert [(pair.second.steps.micro_batch_size, pair.second.name) for pair in found] == [
        (1, "alltoall"), (1, "flex/deepep"), (4, "alltoall"), (4, "flex/deepep"),
    ]  # fmt: skip
    assert all(pair.first.name == pair.second.name and not pair.first.overlap for pair in found)


def test_other_work_has_no_delta_and_says_why() -> None:
    newer = replace(ENVIRONMENT, versions={"torch": "2.12.0"})
    cells = [outcome("alltoall", 2.0), overlapped("alltoall", 1.5, environment=newer)]
    assert overlap_pairings(cells)[0].delta is None
    text = overlap_text(cells)
    assert "-25.0" not in text
    assert "micro-batch 1, alltoall, overlap: NOT EQUAL work: versions or GPUs differ" in text
    other = overlapped("alltoall", 1.5, config={**OVERLAP, "num_layers": "3"})
    assert "configurations differ in more than overlap: num_layers: 2 / 3" in overlap_text([cells[0], other])


def test_without_a_pair_there_is_no_table() -> None:
    assert overlap_text([outcome("alltoall", 2.0), outcome("allgather", 1.0)]) == ""
    assert overlap_text([overlapped("alltoall", 2.0)]) == ""
