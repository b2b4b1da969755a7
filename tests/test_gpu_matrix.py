"""The GPU table's cells, checked as far as a machine without GPUs can: each is a scenario that fits its GPUs."""

from __future__ import annotations

import pytest

from benchmarks.gpu_matrix import Cell, cells, row
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.memory import check_memory

ALL = {one.name: one for num_gpus in (4, 8) for one in cells(num_gpus)}


@pytest.mark.parametrize("one", [one for one in ALL.values() if "nccl" in one.name], ids=lambda one: one.name)
def test_a_cell_can_be_run(one: Cell) -> None:
    run = dry_run(parse(one.flags).scenario, DryRunOptions(one.num_gpus, cluster=load_cluster("h200_nvlink")))
    check_memory(run)
    assert run.scenario.num_ranks == one.num_gpus


def test_every_cell_of_one_method_stands_for_the_other_too() -> None:
    assert {name.replace("nccl", "nvshmem") for name in ALL if "nccl" in name} <= ALL.keys()
    for name, one in ALL.items():
        assert parse(one.flags).scenario.method in name


def test_fewer_gpus_leave_only_what_fits() -> None:
    assert {one.part for one in cells(4)} == {"speed", "large", "drift", "correctness", "te", "reference"}
    assert all(one.num_gpus <= 4 for one in cells(4))
    assert len([one for one in cells(8) if one.part == "reference"]) == 20


def test_a_cell_without_a_result_has_a_row_that_says_so() -> None:
    one = next(iter(cells(8)))
    assert row(one, None).endswith("no result, see its log")
    assert "failed" in row(one, None)
