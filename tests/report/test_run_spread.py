"""The spread between several runs of one scenario, at the end of a summary."""

from __future__ import annotations

from refit.report.run_spread import run_spread_lines
from refit.results.outcomes import Outcome, judged
from refit.results.refit import RefitResult
from refit.results.result import Result
from refit.results.status import Status
from tests.report.factories import planned, timed


def run_of(name: str, number: int, *seconds: float, status: Status = Status.OK) -> Outcome:
    measured = RefitResult(status=status, engines={"refit": timed(seconds)})
    entry = planned(f"{name}_run{number}", run_of=name)
    return judged(entry, Result(entry.name, status=status, exit_code=0, measurements={"refit": measured}))


def test_the_medians_of_the_runs_and_how_far_they_are_apart() -> None:
    runs = [run_of("a", 1, 0.1, 0.1), run_of("b", 1, 0.2), run_of("a", 2, 0.11, 0.13), run_of("a", 3, 0.09, 0.09)]
    assert run_spread_lines(runs)[2:] == [
        "a: 100.00 ms, median of 3 runs (100.00, 120.00, 90.00), spread 30.0 %; within a run up to 8.3 % (cv)",
        "b: no spread, 1 of 1 runs ended with a verified time",
        "",
    ]


def test_a_wrong_result_is_no_run() -> None:
    runs = [run_of("a", 1, 0.1), run_of("a", 2, 0.1), run_of("a", 3, 0.001, status=Status.WRONG_DATA)]
    assert run_spread_lines(runs)[2].startswith("a: 100.00 ms, median of 2 of 3 runs (100.00, 100.00), spread 0.0 %")


def test_nothing_is_said_of_scenarios_that_run_once() -> None:
    entry = planned("a")
    assert run_spread_lines([judged(entry, Result("a", status=Status.OK))]) == []
