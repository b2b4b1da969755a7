"""Campaigns of runs on one host: they keep time, repeat nothing, and keep what ended well."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.campaign import Budget, Case, add_arguments, keep, measure, result_of, run_all
from refit.cli.parsing import parse
from refit.results.collection import read_collection
from refit.results.result import Result, encoded
from refit.results.status import Status
from refit.results.step import StepResult

FLAGS = ("--model=tiny", "--refit-method=gloo", "--measure=train-step", "--seq-length=32")
CASES = [Case(name, (*FLAGS, f"--micro-batch-size={size}")) for name, size in (("first", 1), ("second", 2))]


def test_a_budget_ends_a_run_and_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run cannot end within a second, in which its ranks do not even import torch."""
    run_all(CASES, tmp_path, [], Budget(1.0), "cpu_any", None)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{CASES[0].name}: exit code 124, ")
    assert second == f"{CASES[1].name}: left for another call, the budget is used up"
    assert (tmp_path / f"cpu_any_{CASES[0].name}.log").exists()
    assert not (tmp_path / f"cpu_any_{CASES[1].name}.log").exists()


def left_by(case: Case, folder: Path, status: Status = Status.OK, *steps: str) -> None:
    """What a run of `case` leaves in a campaign on CPUs."""
    scenario = parse([*case.flags, *steps, "--dry-run"]).scenario
    step = StepResult(status=status, samples=())
    found = Result("any", status=status, exit_code=int(status.exit_code), scenario=scenario)
    found = replace(found, measurements={"train-step": step})
    (folder / f"cpu_any_{case.name}.json").write_text(encoded(found))


def test_a_run_that_is_there_is_not_repeated_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, failed = CASES
    left_by(done, tmp_path)
    left_by(failed, tmp_path, Status.FAILED)
    run_all([done], tmp_path, [], Budget(None), "cpu_any", None)
    assert capsys.readouterr().out == f"{done.name}: there already\n"
    keep([done, failed], tmp_path, tmp_path / "kept.jsonl", "cpu_any")
    assert [result.run_id for result in read_collection(tmp_path / "kept.jsonl")] == [done.name]
    run_all(CASES, tmp_path, [], Budget(0.0), "cpu_any", None)
    left = "left for another call, the budget is used up"
    assert capsys.readouterr().out == f"{done.name}: there already\n{failed.name}: {left}\n"
    run_all([done], tmp_path, ["--num-train-steps=7"], Budget(0.0), "cpu_any", None)
    assert capsys.readouterr().out == f"{done.name}: {left}\n", "what is there has other steps"
    (tmp_path / f"cpu_any_{done.name}.json").write_text("{")
    assert result_of(done, tmp_path, "cpu_any") is None


def test_a_campaign_ends_with_a_report_and_says_what_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done, left = CASES
    left_by(done, tmp_path, Status.OK, "--num-train-steps=20", "--num-train-warmup=4")
    parser = argparse.ArgumentParser()
    add_arguments(parser, str(tmp_path))
    assert measure([done], parser.parse_args(["--cpu"]), "any") == 0
    assert [result.run_id for result in read_collection(tmp_path / "cpu_any.jsonl")] == [done.name]
    assert f"Config: {done.name}" in capfd.readouterr().out
    assert measure([done, left], parser.parse_args(["--cpu", "--budget-minutes=0"]), "any") == 1
    assert f"{left.name}: left for another call" in capfd.readouterr().out
