"""The log's header, times, table and progress lines, word for word."""

from __future__ import annotations

from refit.report import text
from refit.report.progress import Progress
from tests.report.factories import engine, result, sample

EVEN = [[0.02] * 4 + [0.04] * 2 + [0.0] * 2] * 5


def test_the_header_says_what_moves_where_and_how_fast_it_could_be() -> None:
    lines = text.header(
        result(), ["a choice"], "38.4 ms on h200_nvlink: rank 4 receives 15.00 GB within its node at 391 GB/s"
    )
    assert lines.splitlines() == [
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
    made = result()
    made.scenario["mode"] = "collocated"
    made.layouts["destination"]["first_rank"] = 0
    lines = text.header(made, [], "")
    assert "# TP2 EP2 -> TP2 EP1 (4 and 2 on the same 4, 4 idle), collocated" in lines
    assert "lower bound" not in lines
    made.layouts["destination"]["world_size"] = 4
    assert "(4 shared, 4 idle)" in text.header(made, [], "")


def test_times_and_table_hold_the_share_of_the_bound() -> None:
    measured = engine(EVEN)
    measured.share_of_lower_bound = 0.96
    assert text.times(measured, result().bound).splitlines() == [
        "Mean refit time: 40.00 ms",
        "Min refit time:  40.00 ms",
        "Max refit time:  40.00 ms",
        "Median refit time: 40.00 ms, p95 40.00 ms",
        "Bottleneck bandwidth: 355.800 GB/s",
        "Lower bound: 38.40 ms, reached 96 %",
        "Cold refit: plan 125.00 ms, prepare 250.00 ms, first 500.00 ms",
    ]
    assert "Lower bound" not in text.times(measured, None)
    rows = text.table({"refit": measured, "megatron": engine(EVEN)}).splitlines()
    assert rows[0].split() == [
        "engine", "median", "mean", "min", "max", "first", "bottleneck", "of", "bound", "staging", "#wrong", "status",
    ]  # fmt: skip
    assert rows[1].split() == ["(ms)"] * 5 + ["(GB/s)", "(%)", "(MiB)"]
    assert rows[2].split() == ["refit", *["40.00"] * 4, "875.00", "355.800", "96", "512.0", "0", "ok"]
    assert rows[3].split()[7:9] == ["-", "512.0"]
    assert all(len(row) <= 100 for row in rows)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def printed(
    progress: Progress, clock: Clock, step_s: float, numbers: range, total: int, wrong: tuple[int, ...] = ()
) -> list[int]:
    """Which refits get a line when one ends every `step_s`."""
    found = []
    for number in numbers:
        line = progress.line(sample([0.1], number, num_wrong=int(number in wrong)), number, total)
        found += [number] if line else []
        clock.now += step_s
    return found


def test_progress_is_no_more_than_a_line_a_second_but_the_first_and_the_last() -> None:
    clock = Clock()
    assert printed(Progress("refit", clock), clock, 0.25, range(1, 12), 11) == [1, 5, 9, 11]
    assert printed(Progress("refit", clock), clock, 2.0, range(1, 4), 3) == [1, 2, 3]


def test_the_last_warm_up_is_no_last_line() -> None:
    clock = Clock()
    progress = Progress("refit", clock)
    assert progress.line(sample([0.1], 0, warmup=True), 1, 2)
    assert not progress.line(sample([0.1], 1, warmup=True), 2, 2)
    assert progress.line(sample([0.1], 2), 1, 1) == "refit 1/1: 100.00 ms (slowest rank 0: wire 75.00, rest 0.00)"


def test_a_refit_with_wrong_elements_always_has_its_line() -> None:
    clock = Clock()
    assert printed(Progress("refit", clock), clock, 0.01, range(1, 10), 9, wrong=(4, 5)) == [1, 4, 5, 9]
    assert "1 WRONG" in Progress("refit", clock).line(sample([0.1], num_wrong=1), 1, 2)
