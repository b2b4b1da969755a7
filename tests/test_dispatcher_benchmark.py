"""The campaign of token dispatchers on one host: its runs fit, come in the order of their importance, and keep time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.dispatchers import IMPLEMENTATIONS, Budget, Campaign, keep, memory_bytes, result_of, run_all
from refit.results.collection import read_collection
from refit.results.result import Result, encoded
from refit.results.status import Status
from refit.results.sweep import check_name

H200_BYTES = 139 << 30


@pytest.mark.parametrize("num_gpus", [4, 8])
def test_every_run_fits_an_h200(num_gpus: int) -> None:
    """With 10 % left for what the estimate does not count: gathered tokens, the allocator's gaps."""
    cases = list(Campaign(num_gpus, implementations=tuple(IMPLEMENTATIONS)).cases())
    for case in cases:
        assert 10 << 30 < memory_bytes(case, num_gpus) < 0.9 * H200_BYTES, case.name
        check_name(case.name, "case")
    assert len({case.name for case in cases}) == len(cases) == 2 * 2 * 2 * 3 + 1


def test_what_says_most_comes_first() -> None:
    names = [case.name for case in Campaign(4).cases()]
    assert names[:4] == ["EP4_mb1_alltoall", "EP4_mb1_allgather", "EP4_mb4_alltoall", "EP4_mb4_allgather"]
    assert names.index("TP2_EP2_mb4_allgather") < names.index("cycle") < names.index("EP4_mb2_alltoall")


def test_a_budget_ends_a_run_and_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run cannot end within a second, in which its ranks do not even import torch."""
    cases = list(Campaign(2, tp=1, cpu=True).cases())[:2]
    run_all(cases, tmp_path, [], Budget(1.0))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{cases[0].name}: exit code ")
    assert "exit code 0" not in first
    assert second == f"{cases[1].name}: left for another call, the budget is used up"
    assert (tmp_path / f"{cases[0].name}.log").exists()
    assert not (tmp_path / f"{cases[1].name}.log").exists()


def test_a_run_that_is_there_is_not_repeated_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, failed = list(Campaign(2, tp=1, cpu=True).cases())[:2]
    (tmp_path / f"{done.name}.json").write_text(encoded(Result("any", status=Status.OK, exit_code=0)))
    (tmp_path / f"{failed.name}.json").write_text(encoded(Result("any", status=Status.FAILED, exit_code=4)))
    run_all([done], tmp_path, [], Budget(None))
    assert capsys.readouterr().out == f"{done.name}: there already\n"
    keep([done, failed], tmp_path, tmp_path / "kept.jsonl")
    assert [result.run_id for result in read_collection(tmp_path / "kept.jsonl")] == [done.name]
    (tmp_path / f"{done.name}.json").write_text("{")
    assert result_of(done, tmp_path) is None
