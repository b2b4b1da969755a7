"""The GPU table's cells, checked as far as a machine without GPUs can: each is a scenario that fits its GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_matrix import cells
from benchmarks.listed import write_list
from benchmarks.matrix import Cell, row, run_all, selection
from refit.cli.parsing import parse
from refit.config.clusters import load_cluster
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.memory import check_memory
from refit.results.collection import read_collection
from refit.results.status import Status
from refit.results.sweep import check_name
from refit.sweep.selection import select_file
from tests.report.factories import planned, result, timed

ALL = {one.name: one for num_gpus in (2, 4, 8) for one in cells(num_gpus)}


@pytest.mark.parametrize("one", [one for one in ALL.values() if "nccl" in one.name], ids=lambda one: one.name)
def test_a_cell_can_be_run(one: Cell) -> None:
    run = dry_run(parse(one.flags).scenario, DryRunOptions(one.num_ranks, cluster=load_cluster("h200_nvlink")))
    check_memory(run)
    assert run.scenario.num_ranks == one.num_ranks


@pytest.mark.slow
def test_every_cell_of_one_method_stands_for_the_other_too() -> None:
    assert {name.replace("nccl", "nvshmem") for name in ALL if "nccl" in name} <= ALL.keys()
    for name, one in ALL.items():
        assert parse(one.flags).scenario.method in name


def test_fewer_gpus_leave_only_what_fits() -> None:
    assert {one.part for one in cells(4)} == {
        "speed",
        "large",
        "drift",
        "correctness",
        "te",
        "reference",
        "fp8",
        "fp8-large",
    }
    assert all(one.num_ranks <= 4 for one in cells(4))
    assert len([one for one in cells(8) if one.part == "reference"]) == 30


def test_a_row_names_every_baseline() -> None:
    one, entry = next(iter(cells(8))), planned("a")
    engines = {"refit": timed([0.05]), "megatron": timed([0.1]), "other-engine": timed([0.2], num_wrong=3)}
    text = row(one, result(entry, engines=engines))
    assert "Megatron-Core over nvshmem 100.0 ms, wrong 0, 2.00 x as long; other-engine over nvshmem 200.0 ms" in text
    engines["megatron"] = replace(engines["megatron"], transport="nccl")
    text = row(one, result(entry, engines=engines))
    assert "Megatron-Core over nccl 100.0 ms, wrong 0, 2.00 x as long (nvshmem against nccl); other-engine" in text


def test_no_two_cells_share_a_name_in_a_file() -> None:
    for num_gpus in (4, 8):
        slugs = [one.slug for one in cells(num_gpus)]
        assert len(set(slugs)) == len(slugs)
        for slug in slugs:
            check_name(slug, "cell")
        assert len({one.part for one in cells(num_gpus)}) == 8


def test_a_cell_that_is_refused_is_in_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = Cell("part", "part a -> b", ("--model=tiny", "--refit-method=gloo", "--source-world-size=3000"), 1)
    assert run_all([refused], tmp_path, "cpu") == 1
    (kept,) = read_collection(tmp_path / "cpu_part.jsonl")
    assert (kept.run_id, kept.status) == ("part_a_to_b", Status.FAILED)
    assert "CPUs" in str(kept.failure)
    assert "0 of 1 cells right or waived" in capsys.readouterr().out
    assert "part a -> b" in (tmp_path / "table.txt").read_text()
    assert list((tmp_path / "logs").glob("*_sweep.json"))


def test_a_flag_that_nothing_takes_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_all([Cell("part", "a", ("--no-such-flag",), 1)], tmp_path, "cpu")
    assert ended.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err


def test_the_list_of_cells_is_one_for_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picked = [one for one in cells(2) if "nvshmem" in one.name]
    write_list(selection(picked, "gpu2"), tmp_path / "list.yaml")
    read = select_file(str(tmp_path / "list.yaml"), [])
    assert read.title == "gpu2 matrix"
    assert [one.name for one in read.candidates] == [one.slug for one in picked]
    for one, candidate in zip(picked, read.candidates, strict=True):
        expected = parse([*one.flags, "--timeout=60"]).scenario
        assert parse(candidate.flags).scenario == expected, one.name
