"""The headline: word for word, for results that count and for those that do not, and the same everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from refit.commands import main
from refit.config.scenario import Verify
from refit.plan.cost import Bound
from refit.report.refits import refit_lines
from refit.report.refits.headline import headlines, moved_text
from refit.report.refits.sweep_table import outcome_lines
from refit.results.outcomes import Outcome, judged
from refit.results.refit import EngineResult, ForwardCheck, NotMoved, RefitResult
from refit.results.result import Failure
from refit.results.runs import outcome_of
from refit.results.status import Status
from tests.report.factories import engine, planned, result, sample, scenario, side, timed, write_result

ENTRY = planned("A", side(2, 2), side(2, 1), method="nccl")
TIMES = (0.0609, 0.0612, 0.0616, 0.0618, 0.0621, 0.0625, 0.0630)
MEASURED = replace(
    timed(TIMES, gb_per_s=291.4),
    samples=tuple(sample([t] * 6, n, num_compared=13_713_920) for n, t in enumerate(TIMES)),
)
LINE = (
    "TP2 EP2 -> TP2 EP1 over nccl: 61.8 ms median (60.9-63.0, 7 refits), 291 GB/s = 74 % of the link's bound, "
    "0 of 96.0 M elements wrong"
)
BOUND_S = 0.0457


def lines(*, bound_s: float | None = BOUND_S, status: Status = Status.OK, **engines: EngineResult) -> list[str]:
    return headlines(judged(ENTRY, result(ENTRY, bound_s=bound_s, engines=engines, status=status)))


def line(measured: EngineResult, *, bound_s: float | None = BOUND_S, status: Status = Status.OK) -> str:
    (found,) = lines(refit=measured, bound_s=bound_s, status=status)
    return found.removeprefix("TP2 EP2 -> TP2 EP1 over nccl: ")


def test_a_result_that_counts() -> None:
    assert lines(refit=MEASURED) == [LINE]


def test_it_is_the_same_in_logs_sweeps_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = result(ENTRY, bound_s=BOUND_S, engines={"refit": MEASURED})
    assert ran.refit is not None
    assert LINE in refit_lines.closing_lines(ran.refit, ran)
    assert outcome_lines(ENTRY, ran) == f"A: {LINE}"
    write_result(tmp_path / "one.json", ran)
    for form in ("text", "markdown"):
        assert main(["report", str(tmp_path), "--format", form]) == 0
        assert LINE.replace(">", "&gt;" if form == "markdown" else ">") in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["median_ms"], row["gb_per_s"], row["num_wrong"]) == (pytest.approx(61.8), 291.4, 0)


def test_without_a_bound_there_is_no_word_of_one() -> None:
    assert line(MEASURED, bound_s=None) == (
        "61.8 ms median (60.9-63.0, 7 refits), 291 GB/s, 0 of 96.0 M elements wrong"
    )


def test_a_refit_within_gpus_has_no_speed_of_a_link() -> None:
    within = replace(MEASURED, bottleneck_gb_per_s=0.0)
    assert "7 refits), 74 % of the lower bound, 0 of" in line(within)
    assert "7 refits), 0 of" in line(within, bound_s=None)


@pytest.mark.parametrize(
    ("samples_s", "shown"),
    [
        ((1.3331, 1.3412), "1.34 s median (1.33-1.34, 2 refits)"),
        ((0.00912, 0.0334, 0.0161), "16.1 ms median (9.1-33.4, 3 refits)"),
        ((0.000123,), "123 us median (1 refit)"),
        ((0.5, 1.5, 0.9), "900 ms median (500-1,500, 3 refits)"),
    ],
)
def test_all_three_times_have_one_unit(samples_s: tuple[float, ...], shown: str) -> None:
    assert line(timed(samples_s)).startswith(shown)


def test_what_does_not_count_says_so_first_and_has_no_share_of_the_bound() -> None:
    wrong = timed((0.01, 0.01), num_wrong=7)
    assert line(wrong, status=Status.WRONG_DATA) == (
        "WRONG; 10.0 ms median (10.0-10.0, 2 refits), 48.1 GB/s, 21 of 3.00 M elements wrong"
    )
    unchecked = replace(timed([0.1]), samples=(sample([0.1], num_compared=0),))
    assert line(unchecked) == "UNVERIFIED; 100 ms median (1 refit), 48.1 GB/s, no element compared"
    other = replace(MEASURED, forward=ForwardCheck(False))
    assert line(other, status=Status.WRONG_DATA).startswith("WRONG; 61.8 ms")
    assert line(other, status=Status.WRONG_DATA).endswith("elements wrong, forward check failed")


def test_a_failed_result_gives_its_reason() -> None:
    failed = result(
        ENTRY, status=Status.FAILED, engines={}, failure=Failure("CUDA out of memory:\n tried 2 GiB", 3, "first refit")
    )
    reason = "FAILED: rank 3, phase 'first refit': CUDA out of memory: tried 2 GiB"
    assert headlines(judged(ENTRY, failed)) == [f"TP2 EP2 -> TP2 EP1 over nccl: {reason}"]
    measured = replace(failed, measurements={"refit": RefitResult(engines={"refit": MEASURED})})
    assert headlines(judged(ENTRY, measured))[0].startswith(f"TP2 EP2 -> TP2 EP1 over nccl: {reason}; 61.8 ms median")
    early = outcome_of("early", replace(failed, scenario=None))
    assert headlines(early)[0].startswith("unknown layouts over unknown: FAILED: rank 3")


def test_what_was_never_run_gives_its_reason() -> None:
    refused = Outcome(ENTRY, Status.REFUSED, "6 GPUs needed > 4 available", None)
    assert headlines(refused) == ["TP2 EP2 -> TP2 EP1 over nccl: REFUSED: 6 GPUs needed > 4 available"]


def test_shared_gpus_and_a_sample_of_rows_are_named() -> None:
    shared = planned("A", side(2, 2), side(2, 1), "collocated", "nccl")
    ran = result(shared, scenario=replace(scenario(shared), verify=Verify.SAMPLE))
    (found,) = headlines(judged(shared, ran))
    assert found.startswith("TP2 EP2 -> TP2 EP1 collocated over nccl: 45.2 ms")
    assert found.endswith("elements wrong (every 16th row compared)")


def test_two_engines_have_a_line_each_and_the_ratio() -> None:
    slow = replace(engine([[0.08]] * 5), cold_s={"prepare": 1.0, "first": 0.75})
    found = lines(refit=engine([[0.04]] * 5), megatron=slow, bound_s=0.02)
    assert found == [
        "TP2 EP2 -> TP2 EP1 over nccl: 40.0 ms median (40.0-40.0, 5 refits), 356 GB/s = 50 % of the link's bound, "
        "0 of 700 elements wrong",
        "TP2 EP2 -> TP2 EP1 over nccl by Megatron-Core: 80.0 ms median (80.0-80.0, 5 refits), 356 GB/s = 25 % of the "
        "link's bound, 0 of 700 elements wrong",
        "Ratio: refit is 2.00 x as fast as Megatron-Core's own (median), 2.00 x cold",
    ]
    waived = EngineResult(Status.WAIVED, "the installed wheel has no\nNVSHMEM kernel")
    assert lines(refit=MEASURED, megatron=waived)[1:] == [
        "TP2 EP2 -> TP2 EP1 over nccl by Megatron-Core: WAIVED: the installed wheel has no NVSHMEM kernel"
    ]


def test_a_baseline_that_runs_alone_is_named() -> None:
    assert lines(megatron=MEASURED, bound_s=None)[0].startswith("TP2 EP2 -> TP2 EP1 over nccl by Megatron-Core: 61.8")


def test_a_wrong_result_gives_no_ratio() -> None:
    ours, wrong = timed([0.1]), timed([0.2], num_wrong=3)
    assert lines(refit=ours, megatron=wrong)[2] == "Ratio: none: Megatron-Core is WRONG"
    assert lines(refit=wrong, megatron=ours, status=Status.WRONG_DATA)[2] == "Ratio: none: refit is WRONG"
    assert lines(refit=ours, megatron=ours, status=Status.FAILED)[2] == "Ratio: none: refit is failed"


def test_a_bound_known_before_the_run_is_used() -> None:
    entry = replace(ENTRY, bound=Bound("h200_nvlink", BOUND_S, "rank 4 receives ..."))
    assert headlines(judged(entry, result(entry, engines={"refit": MEASURED}))) == [LINE]


def test_a_partial_result_says_what_was_moved_and_has_no_ratio() -> None:
    left_out = (NotMoved("the dtype changes", 1, 512, 1024, ("output_layer.weight",)),)
    partial = replace(timed([0.2] * 3, gb_per_s=None), not_moved=left_out)
    _, theirs, ratio = lines(**{"refit": MEASURED, "nccl-m2n": partial})
    cost = result(ENTRY).refit.plan  # type: ignore[union-attr]
    assert f"by NCCL M2N: PARTIAL: {moved_text(cost, partial)}; 200 ms median" in theirs
    assert "of the link's bound" not in theirs
    assert ratio == "Ratio: none: NCCL M2N is partial"
    assert moved_text(None, partial) == "1.02 kB not moved"
