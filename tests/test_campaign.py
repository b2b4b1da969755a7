"""Campaigns of runs on one host: they keep time, repeat nothing, and keep what ended well."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.campaign import Budget, Case, add_arguments, keep, measure, result_of, run_all
from refit.results.collection import read_collection
from refit.results.result import Result, encoded
from refit.results.status import Status

FLAGS = ("--model=tiny", "--refit-method=gloo", "--measure=train-step", "--seq-length=32")
CASES = [Case(name, (*FLAGS, f"--micro-batch-size={size}")) for name, size in (("first", 1), ("second", 2))]


def test_a_budget_ends_a_run_and_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run cannot end within a second, in which its ranks do not even import torch."""
    run_all(CASES, tmp_path, [], Budget(1.0))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{CASES[0].name}: exit code ")
    assert "exit code 0" not in first
    assert second == f"{CASES[1].name}: left for another call, the budget is used up"
    assert (tmp_path / f"{CASES[0].name}.log").exists()
    assert not (tmp_path / f"{CASES[1].name}.log").exists()


def test_a_run_that_is_there_is_not_repeated_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, failed = CASES
    (tmp_path / f"{done.name}.json").write_text(encoded(Result("any", status=Status.OK, exit_code=0)))
    (tmp_path / f"{failed.name}.json").write_text(encoded(Result("any", status=Status.FAILED, exit_code=4)))
    run_all([done], tmp_path, [], Budget(None))
    assert capsys.readouterr().out == f"{done.name}: there already\n"
    keep([done, failed], tmp_path, tmp_path / "kept.jsonl")
    assert [result.run_id for result in read_collection(tmp_path / "kept.jsonl")] == [done.name]
    (tmp_path / f"{done.name}.json").write_text("{")
    assert result_of(done, tmp_path) is None


def test_a_campaign_ends_with_a_report_and_says_what_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done, left = CASES
    (tmp_path / f"{done.name}.json").write_text(encoded(Result("any", status=Status.OK, exit_code=0)))
    parser = argparse.ArgumentParser()
    add_arguments(parser, str(tmp_path))
    assert measure([done], parser.parse_args(["--cpu"]), "any") == 0
    assert [result.run_id for result in read_collection(tmp_path / "cpu_any.jsonl")] == [done.name]
    assert f"Config: {done.name}" in capfd.readouterr().out
    assert measure([done, left], parser.parse_args(["--num-gpus=2", "--budget-minutes=0"]), "any") == 1
    assert f"{left.name}: left for another call" in capfd.readouterr().out
    assert [result.run_id for result in read_collection(tmp_path / "gpu2_any.jsonl")] == [done.name]
