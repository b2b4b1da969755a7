"""Two runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.commands import compare
from refit.errors import UsageError
from refit.report.refits.compare import Comparison, compare_runs, compare_text, exit_code
from refit.results.result import Failure, Gpu, Result
from refit.results.runs import Run, find_run
from refit.results.status import Status
from tests.report.factories import ENVIRONMENT, planned, result, side, sweep_of, timed, write_result, write_run

GOLDEN = Path(__file__).parents[1] / "golden"
FAST = (0.100, 0.101, 0.102, 0.101, 0.100)
SLOW = (0.120, 0.121, 0.122, 0.121, 0.120)
A, B, C = (planned(name) for name in "ABC")


def run_of(directory: Path, results: dict[str, Result | None], run_id: str = "run") -> Run:
    """A sweep of the scenarios named, with these results."""
    return find_run(write_run(directory, sweep_of([planned(name) for name in results], run_id), results))


def compared(directory: Path, old: Sequence[float], new: Sequence[float], **changes: Any) -> tuple[Run, Comparison]:
    """Scenario A with `old` and with `new` times, and `changes` of the new result."""
    first = run_of(directory / "old", {"A": result(A, old)}, "first")
    second = run_of(directory / "new", {"A": result(A, new, **changes)}, "second")
    return second, compare_runs(first, second)


@pytest.mark.parametrize(
    ("new", "allowed", "code"),
    [(FAST, 0.0, 0), (SLOW, 0.05, 5), (SLOW, 0.25, 0), ([0.05] * 5, 0.05, 0)],
)
def test_slower_than_allowed(new: Sequence[float], allowed: float, code: int, tmp_path: Path) -> None:
    run, comparison = compared(tmp_path, FAST, new)
    assert exit_code(run, run, comparison, allowed) == code


def test_wrong_data_weighs_more_than_time(tmp_path: Path) -> None:
    engines = {"refit": timed(SLOW, num_wrong=3)}
    run, comparison = compared(tmp_path, FAST, SLOW, status=Status.WRONG_DATA, engines=engines)
    assert exit_code(run, run, comparison, 0.05) == 1


def test_a_scenario_that_no_longer_runs_is_a_failure(tmp_path: Path) -> None:
    run, comparison = compared(tmp_path, FAST, FAST, status=Status.FAILED, engines={}, failure=Failure("killed"))
    assert exit_code(run, run, comparison, 0.05) == 4


def test_a_scenario_that_is_gone_is_a_failure_between_sweeps(tmp_path: Path) -> None:
    failed = result(C, status=Status.FAILED, engines={}, failure=Failure("killed"))
    old = run_of(tmp_path / "old", {"A": result(A, FAST), "B": result(B, FAST), "C": failed}, "old")
    new = run_of(tmp_path / "new", {"A": result(A, FAST)}, "new")
    assert exit_code(old, new, compare_runs(old, new), 0.05) == 4
    assert exit_code(new, old, compare_runs(new, old), 0.05) == 0
    lost_failed = run_of(tmp_path / "newer", {"A": result(A, FAST), "B": result(B, FAST)}, "newer")
    assert exit_code(old, lost_failed, compare_runs(old, lost_failed), 0.05) == 0


def repeated(directory: Path, *runs: Sequence[float] | None, name: str = "A") -> Run:
    """A sweep in which scenario A runs several times: the times of each run, None for one that failed."""
    entries = [planned(f"{name}_run{number}", run_of=name) for number in range(1, len(runs) + 1)]
    failed: dict[str, Any] = {"status": Status.FAILED, "engines": {}, "failure": Failure("killed")}
    results = {
        entry.name: result(entry, **failed) if times is None else result(entry, times)
        for entry, times in zip(entries, runs, strict=True)
    }
    return find_run(write_run(directory, sweep_of(entries, directory.name), results))


def shifted(seconds: float) -> list[float]:
    return [each + seconds for each in FAST]


def test_runs_of_one_scenario_are_compared_as_one(tmp_path: Path) -> None:
    """Refits of a run are within 1 % of each other, and runs 20 %: a change of 10 % may be chance, one of 60 % not."""
    old = repeated(tmp_path / "old", shifted(0), shifted(0.02), shifted(0.01))
    near = repeated(tmp_path / "near", shifted(0.01), shifted(0.03), shifted(0.02))
    far = repeated(tmp_path / "far", shifted(0.06), shifted(0.08), shifted(0.07))
    (pair,) = (comparison := compare_runs(old, near)).pairs
    assert (pair.name, pair.old.median_s, pair.new.median_s) == ("A", pytest.approx(0.111), pytest.approx(0.121))
    assert pair.is_beyond_spread is False
    assert exit_code(old, near, comparison, 0.05) == 5
    assert compare_runs(old, far).pairs[0].is_beyond_spread is True
    text = compare_text(old, near, comparison, 0.05)
    assert "The notch reaches at least to the farthest run's median" in text
    assert "In old: A over nvshmem: 111.00 ms, median of 3 runs (101.00, 121.00, 111.00), spread 18.0 %; within" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("A "))
    assert row == ["A", "111.00", "121.00", "+9.0", "no", "0", "0", "nvshmem", "SLOWER"]


def test_a_single_run_is_compared_with_several(tmp_path: Path) -> None:
    once = run_of(tmp_path / "once", {"A": result(A, FAST)})
    thrice = repeated(tmp_path / "thrice", shifted(0), shifted(0.02), shifted(0.01))
    for old, new in ((once, thrice), (thrice, once)):
        (pair,) = compare_runs(old, new).pairs
        assert pair.is_beyond_spread is False
    write_result(tmp_path / "alone.json", result(A, FAST))
    (pair,) = (comparison := compare_runs(find_run(tmp_path / "alone.json"), thrice)).pairs
    assert pair.new.median_s == pytest.approx(0.111)
    assert comparison.warnings == ()


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ((FAST, FAST, FAST), (FAST, None, FAST), 4),
        ((FAST, None, FAST), (None, None, None), 4),
        ((FAST, None, FAST), (FAST, FAST, None), 0),
        ((None, None, None), (None, None, None), 0),
        ((FAST, None, FAST), (FAST,), 0),
    ],
)
def test_a_smaller_share_of_good_runs_is_a_failure(
    old: Sequence[Sequence[float] | None], new: Sequence[Sequence[float] | None], code: int, tmp_path: Path
) -> None:
    runs = repeated(tmp_path / "old", *old), repeated(tmp_path / "new", *new)
    assert exit_code(*runs, compare_runs(*runs), 0.05) == code


def test_a_failed_run_is_named_and_does_not_count(tmp_path: Path) -> None:
    old, new = repeated(tmp_path / "old", FAST, FAST), repeated(tmp_path / "new", FAST, None, shifted(0.02))
    text = compare_text(old, new, compare_runs(old, new), 0.25)
    assert "In new: A_run2 is not counted: failed: killed" in text
    (row,) = (line for line in text.splitlines() if line.startswith("A "))
    assert row.split()[:4] == ["A", "101.00", "111.00", "+9.9"]
    assert row.endswith("ok (2 of 3 runs)")


def test_wrong_data_of_one_run_is_wrong_data(tmp_path: Path) -> None:
    old, new = repeated(tmp_path / "old", FAST, FAST), repeated(tmp_path / "new", FAST, FAST)
    bad = replace(new.outcomes[1], status=Status.WRONG_DATA, reason="3 of 100 elements wrong")
    new = replace(new, outcomes=(new.outcomes[0], bad))
    comparison = compare_runs(old, new)
    assert exit_code(old, new, comparison, 0.05) == 1
    assert "In new: A_run2 is not counted: wrong data: 3 of 100" in compare_text(old, new, comparison, 0.05)


def test_what_failed_before_and_still_does_is_no_news(tmp_path: Path) -> None:
    failed = result(A, status=Status.FAILED, engines={}, failure=Failure("killed"))
    old, new = (run_of(tmp_path / name, {"A": failed, "B": result(B, FAST)}, name) for name in ("old", "new"))
    assert exit_code(old, new, compare_runs(old, new), 0.05) == 0


def test_the_text(tmp_path: Path) -> None:
    environment = replace(
        ENVIRONMENT, versions={**ENVIRONMENT.versions, "torch": "2.13.0"}, gpus=(Gpu("NVIDIA H200"),) * 8
    )
    old = run_of(tmp_path / "old", {"A": result(A, FAST), "B": result(B, FAST), "C": None}, "first")
    failure = Failure("timed out after 600 s")
    results = {
        "A": result(A, SLOW, environment=environment),
        "B": result(B, status=Status.FAILED, engines={}, failure=failure, environment=environment),
        "D": None,
    }
    new = run_of(tmp_path / "new", results, "second")
    text = compare_text(old, new, compare_runs(old, new), 0.05)
    assert text + "\n" == (GOLDEN / "compare.txt").read_text()


def test_single_results_are_matched_by_what_they_ran(tmp_path: Path) -> None:
    small, collocated = planned("small", side(2, 2), side(2, 1)), planned("small", side(2, 2), side(2, 1), "collocated")
    for folder, names in (("old", "xy"), ("new", "zw")):
        (tmp_path / folder).mkdir()
        for name, entry in zip(names, (small, collocated), strict=True):
            write_result(tmp_path / folder / f"{name}.json", result(entry, FAST))
    comparison = compare_runs(find_run(tmp_path / "old"), find_run(tmp_path / "new"))
    assert sorted((pair.old.name, pair.new.name) for pair in comparison.pairs) == [
        ("x", "z"),
        ("y", "w"),
    ]
    assert comparison.warnings == ()


def test_two_result_files_are_a_pair_whatever_they_ran(tmp_path: Path) -> None:
    for name, entry in (("one", A), ("two", planned("A", method="nccl"))):
        write_result(tmp_path / f"{name}.json", result(entry, FAST))
    comparison = compare_runs(find_run(tmp_path / "one.json"), find_run(tmp_path / "two.json"))
    assert comparison.pairs[0].change == 0
    assert comparison.warnings[0].startswith(
        "not the same scenario: TP8 EP8 -> TP8 EP4, non-collocated, nvshmem, kimi_k2 / "
    )


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    old, new = run_of(tmp_path / "old", {"A": result(A)}, "first"), run_of(tmp_path / "new", {"B": result(B)}, "second")
    with pytest.raises(UsageError, match="no scenario is in both runs: first has A; second has B"):
        compare_runs(old, new)


def test_the_command_ends_with_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared(tmp_path, FAST, SLOW)
    parser = argparse.ArgumentParser()
    compare.add(parser.add_subparsers())
    folders = [str(tmp_path / name) for name in ("old", "new")]
    for flags, code in (
        ([], 5),
        (["--max-slowdown", "30%"], 0),
        (["--max-slowdown", "0.3"], 0),
        (["--max-slowdown", "19%"], 5),
    ):
        args = parser.parse_args(["compare", *folders, *flags])
        assert args.run(args) == code
    assert "1 of 1 scenario slower by more than 5 %: A" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["-1%", "fast", "nan", "inf", "%"])
def test_a_slowdown_that_is_no_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"such as 5% or 0\.05"):
        compare.share(text)
