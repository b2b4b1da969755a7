"""The spread between several runs of one scenario, in the summary, in Markdown and on the page."""

from __future__ import annotations

from pathlib import Path

from refit.report.page import Pictures, page
from refit.report.run_spread import run_spread_lines
from refit.report.tables import markdown_text
from refit.results.outcomes import Outcome, judged
from refit.results.refit import RefitResult
from refit.results.result import Result
from refit.results.runs import Run
from refit.results.status import Status
from tests.report.factories import planned, sweep_of, timed


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


def test_markdown_and_the_page_show_it_too() -> None:
    entries = [run_of("a", number, seconds) for number, seconds in enumerate((0.1, 0.12), 1)]
    run = Run(Path(), sweep_of([entry.planned for entry in entries]), tuple(entries), is_sweep=True)
    line = "a: 110.00 ms, median of 2 runs (100.00, 120.00), spread 18.2 %"
    for text in (markdown_text(run), page([run], [Pictures()])):
        assert line in text
        assert "1 scenario in 2 runs: 2 ok" in text


def test_a_wrong_result_is_no_run() -> None:
    runs = [run_of("a", 1, 0.1), run_of("a", 2, 0.1), run_of("a", 3, 0.001, status=Status.WRONG_DATA)]
    assert run_spread_lines(runs)[2].startswith("a: 100.00 ms, median of 2 of 3 runs (100.00, 100.00), spread 0.0 %")


def test_nothing_is_said_of_scenarios_that_run_once() -> None:
    entry = planned("a")
    assert run_spread_lines([judged(entry, Result("a", status=Status.OK))]) == []
