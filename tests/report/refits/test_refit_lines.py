"""The log's header, times, table, ratio, forward and progress lines, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refit.config.scenario import Mode, Scenario
from refit.report.refits import refit_lines
from refit.report.refits.progress import Progress
from refit.results.refit import WrongWeights
from refit.results.result import Environment, Result
from refit.results.stats import stability
from tests.report.factories import engine, on_ranks_from, sample, side, small_run, timed

EVEN = [[0.02] * 4 + [0.04] * 2 + [0.0] * 2] * 5


def header(run: Result, notes: tuple[str, ...] = (), bound: str = "") -> str:
    assert run.scenario is not None
    assert run.refit is not None
    environment = run.environment or Environment()
    return refit_lines.header(run.scenario, environment, run.world_size or 0, run.refit, notes, bound)


def shared(run: Result, destination_tp: int) -> Result:
    """The same run with TP`destination_tp` EP1 on the source's ranks."""
    assert run.scenario is not None
    destination = on_ranks_from(0, side(destination_tp, 1))
    return replace(run, scenario=replace(run.scenario, mode=Mode.COLLOCATED, destination=destination))


def test_the_header_says_what_moves_where_and_how_fast_it_could_be() -> None:
    bound = "38.4 ms on h200_nvlink: rank 4 receives 15.00 GB within its node at 391 GB/s"
    assert header(small_run(), ("a choice",), bound).splitlines() == [
        "# torch 2.11.0",
        "# node1: 8 x NVIDIA H200",
        "# TP2 EP2 -> TP2 EP1 (4+2, 2 idle), non-collocated, nvshmem, verify full",
        "# model kimi_k2: 1,000 elements in 10 tensors, bfloat16",
        "# payload 30.00 GB: wire 30.00 GB, local 0 bytes in 12 transfers (plan 0123456789ab)",
        "# busiest: rank 4 receives 15.00 GB; busiest sender 1.00 x the mean",
        "# lower bound: 38.4 ms on h200_nvlink: rank 4 receives 15.00 GB within its node at 391 GB/s",
        "# note: a choice",
    ]


def test_the_header_of_shared_ranks_and_of_a_run_without_a_bound() -> None:
    lines = header(shared(small_run(), 2))
    assert "# TP2 EP2 -> TP2 EP1 (4 and 2 on the same 4, 4 idle), collocated" in lines
    assert "lower bound" not in lines
    assert "(4 shared, 4 idle)" in header(shared(small_run(), 4))


def test_times_and_table_hold_the_share_of_the_bound() -> None:
    measured = replace(engine(EVEN), share_of_lower_bound=0.96, transport="shm")
    assert refit_lines.times(replace(measured, connect_s=0.1)).splitlines() == [
        "Mean refit time: 40.00 ms",
        "Min refit time:  40.00 ms",
        "Max refit time:  40.00 ms",
        "Cold refit: 875.00 ms (plan 125.00, prepare 250.00, first 500.00); connections before it 100.00 ms",
        "First refit with connections: 975.00 ms",
    ]
    cold = "Cold refit: 875.00 ms (plan 125.00, prepare 250.00, first 500.00)"
    assert refit_lines.times(replace(measured, connect_s=1e-4)).splitlines()[3:] == [cold]
    rows = refit_lines.table({"refit": measured, "megatron": engine(EVEN)}).splitlines()
    assert rows[0].split() == [
        "engine", "over", "median", "p95", "min", "max", "cold", "bottleneck", "of", "bound", "staging", "#wrong",
        "status",
    ]  # fmt: skip
    assert rows[1].split() == ["(ms)"] * 5 + ["(GB/s)", "(%)", "(MiB)"]
    assert rows[2].split() == ["refit", "shm", *["40.00"] * 4, "875.00", "355.800", "96", "512.0", "0", "ok"]
    assert rows[3].split()[8:10] == ["-", "512.0"]
    assert all(len(row) <= 110 for row in rows)


def test_the_start_is_one_figure_beside_its_parts() -> None:
    run = small_run()
    assert run.refit is not None
    assert refit_lines.start(run.refit) == ""
    started = replace(run.refit, start_s={"imports": 3.0, "process group": 0.25, "first refit": 0.5})
    assert refit_lines.start(started) == (
        "Start: 3.75 s to the end of the first refit, slowest ranks: imports 3.00, process group 0.25, first refit 0.50"
    )


def test_a_table_without_a_bound_has_no_column_for_it() -> None:
    rows = refit_lines.table({"refit": engine(EVEN)}).splitlines()
    assert "bound" not in rows[0]
    assert rows[2].split() == ["refit", "-", *["40.00"] * 4, "875.00", "355.800", "512.0", "0", "ok"]


def test_a_log_ends_with_times_warnings_table_and_verdict() -> None:
    run = small_run(refit=engine(EVEN[:4]))
    assert run.refit is not None
    text = "\n".join(refit_lines.closing_lines(run.refit, run))
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "Mean refit time: 40.00 ms"
    assert [line for line in lines if line.startswith("warning: ")] == [
        "warning: 4 measured refits say little about spread: use --num-benchmark-iterations 5 or more"
    ]
    assert lines[-2:] == [
        "TP2 EP2 -> TP2 EP1 over nvshmem: 40.0 ms median (40.0-40.0, 4 refits), 356 GB/s = 96 % of the link's bound, "
        "0 of 600 elements wrong",
        "PASSED (refit): 600 elements compared over 6 refits, 0 wrong",
    ]


def test_wrong_elements_are_those_of_the_last_refit() -> None:
    found = tuple(WrongWeights(refit, 4, "a.weight", 7, (1, 0), 0.5, None) for refit in (0, 1))
    measured = replace(timed([0.1], num_wrong=7), wrong=found)
    assert refit_lines.wrong_weights("refit", measured).splitlines() == [
        "refit: wrong elements after refit 1",
        "  rank 4  a.weight: 7 wrong, first at (1, 0): expected 0.5, found nan",
    ]
    assert refit_lines.wrong_weights("refit", timed([0.1])) == ""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scenario_of(num_warmup: int, num_iterations: int, most: int | None = None) -> Scenario:
    one = side(1, 1)
    return Scenario(
        *(None, one, one, Mode.COLLOCATED, "gloo"),
        num_warmup=num_warmup,
        num_iterations=num_iterations,
        max_iterations=most,
    )


def printed(clock: Clock, step_s: float, total: int, wrong: tuple[int, ...] = ()) -> list[int]:
    """Which of `total` measured refits get a line when one ends every `step_s`."""
    progress, found = Progress("refit", scenario_of(0, total), clock), []
    for number in range(1, total + 1):
        found += [number] if progress.line(sample([0.1], number - 1, num_wrong=int(number in wrong))) else []
        clock.now += step_s
    return found


def test_progress_is_no_more_than_a_line_a_second_but_the_first_and_the_last() -> None:
    assert printed(Clock(), 0.25, 11) == [1, 5, 9, 11]
    assert printed(Clock(), 2.0, 3) == [1, 2, 3]


def test_the_last_warm_up_is_no_last_line() -> None:
    progress = Progress("refit", scenario_of(2, 1), Clock())
    assert progress.line(sample([0.1], 0, warmup=True)) == (
        "refit warm-up 1/2: 100.00 ms (slowest rank 0: wire 75.00, rest 0.00)"
    )
    assert not progress.line(sample([0.1], 1, warmup=True))
    assert progress.line(sample([0.1], 2)) == "refit 1/1: 100.00 ms (slowest rank 0: wire 75.00, rest 0.00)"
    beside = replace(sample([0.1], 2), beside_s={"quantise": 0.0125})
    assert progress.line(beside) == (
        "refit 1/1: 100.00 ms (slowest rank 0: wire 75.00, rest 0.00; beside them quantise 12.50)"
    )


def test_a_refit_with_wrong_elements_always_has_its_line() -> None:
    assert printed(Clock(), 0.01, 9, wrong=(4, 5)) == [1, 4, 5, 9]
    assert "1 WRONG" in Progress("refit", scenario_of(0, 2), Clock()).line(sample([0.1], num_wrong=1))


def test_the_time_left_is_that_of_the_refits_so_far() -> None:
    clock = Clock()
    progress = Progress("refit", scenario_of(1, 4), clock)
    assert progress.now(0) == "refit warm-up 1/1"
    clock.now = 30.0
    assert progress.now(3) == "refit 3/4, about 20 s left"


def test_without_a_number_of_refits_no_time_is_promised() -> None:
    progress = Progress("refit", scenario_of(0, 5, most=200), Clock())
    assert progress.now(6) == "refit 7/200 at most, until the median is stable"
    assert (progress.line(sample([0.1], 6)) or "").startswith("refit 7/200 at most: 100.00 ms")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.1] * 5, "NOT STABLE (refit): too few samples after 5 refits"),
        ([0.1] * 6, "Stable (refit) after 6 refits: the 97 % confidence interval of the median is 100.00 to 100.00 ms"),
        ([0.1, 0.2] * 4, "NOT STABLE (refit) after 8 refits: the 99 % confidence interval of the median is 100.00 to"),
    ],
)
def test_whether_the_median_got_stable_is_said(samples: list[float], expected: str) -> None:
    assert refit_lines.stability_line("refit", stability(samples)).startswith(expected)
