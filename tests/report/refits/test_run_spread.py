"""The spread between several runs of one scenario, in the summary, in Markdown and on the page."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.report.refits.markdown import markdown_report
from refit.report.refits.page import Pictures, page
from refit.report.refits.run_spread import exceeds_spread, half_width, notch, run_spread_lines
from refit.results.outcomes import Outcome, judged
from refit.results.refit import RefitResult
from refit.results.result import Result
from refit.results.runs import Run
from refit.results.status import Status
from tests.report.factories import planned, sweep_of, timed
from tests.report.steps.test_dispatchers import outcome as dispatched


def run_of(name: str, number: int, *seconds: float, status: Status = Status.OK) -> Outcome:
    measured = RefitResult(status=status, engines={"refit": timed(seconds)})
    entry = planned(f"{name}_run{number}", run_of=name)
    return judged(entry, Result(entry.name, status=status, exit_code=0, measurements={"refit": measured}))


def test_the_medians_of_the_runs_and_how_far_they_are_apart() -> None:
    runs = [run_of("a", 1, 0.1, 0.1), run_of("b", 1, 0.2), run_of("a", 2, 0.11, 0.13), run_of("a", 3, 0.09, 0.09)]
    assert run_spread_lines(runs)[2:] == [
        "a over nvshmem: 100.00 ms, median of 3 runs (100.00, 120.00, 90.00), spread 30.0 %; within a run up to 8.3 % "
        "(cv)",
        "b over nvshmem: no spread, 1 of 1 runs ended with a time that counts",
        "",
    ]


def test_markdown_and_the_page_show_it_too() -> None:
    entries = [run_of("a", number, seconds) for number, seconds in enumerate((0.1, 0.12), 1)]
    run = Run(Path(), sweep_of([entry.planned for entry in entries]), tuple(entries), is_sweep=True)
    line = "a over nvshmem: 110.00 ms, median of 2 runs (100.00, 120.00), spread 18.2 %"
    for text in (markdown_report(run), page([run], [Pictures()])):
        assert line in text
        assert "1 scenario in 2 runs: 2 ok" in text


def test_a_wrong_result_is_no_run() -> None:
    runs = [run_of("a", 1, 0.1), run_of("a", 2, 0.1), run_of("a", 3, 0.001, status=Status.WRONG_DATA)]
    assert run_spread_lines(runs)[2].startswith(
        "a over nvshmem: 100.00 ms, median of 2 of 3 runs (100.00, 100.00), spread 0.0 %"
    )


def test_nothing_is_said_of_scenarios_that_run_once() -> None:
    entry = planned("a")
    assert run_spread_lines([judged(entry, Result("a", status=Status.OK))]) == []


def test_training_steps_have_a_spread_where_nothing_is_refitted() -> None:
    found = dispatched("alltoall", 1.0), dispatched("alltoall", 1.1)
    runs = []
    for number, each in enumerate(found, start=1):
        assert each.result is not None
        entry = planned(f"a_run{number}", run_of="a", scenario=each.result.scenario)
        runs.append(replace(each, planned=entry))
    assert run_spread_lines(runs)[2].startswith("a: 1050.00 ms, median of 2 runs (1000.00, 1100.00), spread 9.5 %")


FAST = (0.100, 0.101, 0.102, 0.101, 0.100)
SLOW = (0.120, 0.121, 0.122, 0.121, 0.120)


def test_spread_of_single_runs() -> None:
    assert exceeds_spread([FAST], [SLOW]) is True
    assert exceeds_spread([SLOW], [FAST]) is True
    assert exceeds_spread([FAST], [FAST]) is False
    wide = (0.08, 0.09, 0.1, 0.11, 0.12)
    assert exceeds_spread([wide], [[seconds + 0.005 for seconds in wide]]) is False
    assert exceeds_spread([(0.1, 0.1)], [SLOW]) is None
    many = list(FAST) * 4
    assert exceeds_spread([[*many, 9.0]], [[*(seconds + 0.01 for seconds in many), 0.001]]) is True


def test_spread_of_several_runs() -> None:
    apart = [seconds + 0.015 for seconds in FAST]
    assert exceeds_spread([FAST, FAST], [SLOW, SLOW]) is True
    assert exceeds_spread([FAST, apart, apart], [SLOW, SLOW]) is False, "a run of the first is as far as the second"
    assert exceeds_spread([FAST, SLOW], [FAST, SLOW]) is False
    assert exceeds_spread([FAST, (0.1, 0.1)], [SLOW]) is None
    assert exceeds_spread([], [SLOW]) is None


@pytest.mark.parametrize(("num_runs", "share"), [(2, 1 / 3), (3, 0.04)])
def test_how_often_equal_scenarios_differ_by_chance(num_runs: int, share: float) -> None:
    """Medians of runs are normally distributed, refits of a run all alike."""
    random = Random(0)
    draws = [[[[random.gauss(1, 0.1)] * 3 for _ in range(num_runs)] for _ in range(2)] for _ in range(3000)]
    assert sum(bool(exceeds_spread(*both)) for both in draws) / len(draws) == pytest.approx(share, abs=0.02)


samples = st.lists(st.floats(0.001, 10.0), min_size=3, max_size=5)
runs = st.lists(samples, min_size=1, max_size=4)


@given(runs, runs)
def test_scenarios_whose_runs_overlap_do_not_differ(old: list[list[float]], new: list[list[float]]) -> None:
    medians = [list(map(statistics.median, each)) for each in (old, new)]
    if exceeds_spread(old, new):
        assert max(medians[0]) < min(medians[1]) or max(medians[1]) < min(medians[0])


@given(runs)
def test_the_interval_is_never_narrower_than_that_of_a_run(found: list[list[float]]) -> None:
    assert half_width(found) >= max(map(notch, found))
    assert half_width(found[:1]) == notch(found[0])
