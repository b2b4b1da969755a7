"""The summary file and the other forms of a run's report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from refit.commands import report
from refit.config.layout import Layout
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.report.refits.export import csv_text, records
from refit.report.refits.markdown import markdown_report
from refit.report.refits.summary import counts_line, side_text, summary_text
from refit.report.refits.sweep_table import sweep_text
from refit.results.outcomes import Outcome, load_outcomes
from refit.results.refit import EngineResult
from refit.results.result import Failure, Result
from refit.results.runs import find_run
from refit.results.status import Status
from refit.results.sweep import Sweep
from tests.report.factories import planned, result, scenario, side, sweep_of, timed, write_result, write_run

GOLDEN = Path(__file__).parents[1] / "golden"

ONE = planned("TP8_EP8_to_TP8_EP4_64to32", side(8, 8), side(8, 4))
TWO = planned("TP16_EP8_to_TP8_EP16_128", side(16, 8), side(8, 16), "collocated", "nccl")
WRONG = planned("wrong_weights", side(2, 2), side(1, 1))
CRASHED = planned("crashed", side(2, 2, etp=1, pp=2), side(2, 1))
WAIVED = planned("no_library")
REFUSED = planned("too_large", status=Status.REFUSED, reason="64 + 128 = 192 GPUs needed > 128 available", cost=None)
SKIPPED = replace(
    planned("odd_cell", status=Status.SKIPPED, reason="16 experts do not divide by EP size 3", cost=None, num_ranks=0),
    source=None,
    destination=None,
)
NEVER = planned("never_started")
CUT_OFF = planned("cut_off")


def full_run(directory: Path) -> Sweep:
    """A sweep in which everything that can happen to a scenario has happened."""
    sweep = sweep_of([ONE, TWO, WRONG, CRASHED, WAIVED, REFUSED, SKIPPED, NEVER, CUT_OFF])
    waived = EngineResult(Status.WAIVED, "the installed wheel has no NVSHMEM kernel")
    results = {
        ONE.name: result(ONE, (0.04487, 0.04521, 0.04561), bound_s=0.0434),
        TWO.name: result(
            TWO,
            local=300_000_000_000,
            bound_s=0.04,
            baseline=timed((0.11, 0.1215, 0.125), num_wrong=42, gb_per_s=None),
        ),
        WRONG.name: result(
            WRONG,
            status=Status.WRONG_DATA,
            engines={"refit": timed((0.01, 0.01), num_wrong=7), "megatron": waived},
        ),
        CRASHED.name: result(
            CRASHED,
            status=Status.FAILED,
            engines={},
            failure=Failure("CUDA out of memory:\n tried 2 GiB", 3, "first refit"),
        ),
        WAIVED.name: Result("x", status=Status.WAIVED, failure=Failure("nvshmem4py is not installed")),
        CUT_OFF.name: result(
            CUT_OFF,
            status=Status.RUNNING,
            engines={"refit": replace(timed((0.05, 0.05), gb_per_s=None), summary=None)},
        ),
    }
    write_run(directory, sweep, results)
    return sweep


@pytest.mark.parametrize("form", ["txt", "md", "csv"])
def test_a_run_reads_as_it_should(form: str, tmp_path: Path) -> None:
    full_run(tmp_path)
    run = replace(find_run(tmp_path), directory=Path("logs"))
    text = {
        "txt": lambda: summary_text(run.sweep, run.outcomes),
        "md": lambda: markdown_report(run),
        "csv": lambda: csv_text(records([run])),
    }[form]()
    assert text + "\n" == (GOLDEN / f"summary.{form}").read_text()


def test_the_lines_of_the_first_users_are_kept_word_for_word(tmp_path: Path) -> None:
    sweep = sweep_of([ONE])
    write_run(tmp_path, sweep, {ONE.name: result(ONE, (0.04487, 0.04521, 0.04561))})
    lines = summary_text(sweep, load_outcomes(sweep, tmp_path)).splitlines()
    assert lines[:10] == [
        "Kimi K2 Refit Benchmark Summary",
        "===============================",
        "Date: 2026-01-26 15:30:00",
        "Job ID: 9876543",
        "Nodes: 16",
        "Total GPUs: 128",
        "",
        "Results:",
        "--------",
        "",
    ]
    assert lines[10:17] == [
        "Config: TP8_EP8_to_TP8_EP4_64to32",
        "  Source: TP=8, EP=8 (64 GPUs)",
        "  Target: TP=8, EP=4 (32 GPUs)",
        "  Mode: non-collocated, Method: nvshmem",
        "Mean refit time: 45.23 ms",
        "Min refit time:  44.87 ms",
        "Max refit time:  45.61 ms",
    ]


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    sweep = sweep_of([ONE])
    failed = result(ONE, status=Status.FAILED, failure=Failure("timed out after 600 s"))
    write_run(tmp_path, sweep, {ONE.name: failed})
    assert [outcome.status for outcome in load_outcomes(sweep, tmp_path)] == [Status.FAILED]
    write_result(tmp_path / f"{sweep.run_id}_{ONE.name}.2.json", result(ONE))
    (tmp_path / f"{sweep.run_id}_{ONE.name}.2.log").write_text("")
    (outcome,) = load_outcomes(sweep, tmp_path)
    assert (outcome.status, outcome.log) == (Status.OK, f"{sweep.run_id}_{ONE.name}.2.log")


def test_a_result_from_before_a_refusal_stands(tmp_path: Path) -> None:
    """A sweep taken up again in a smaller allocation keeps what it has measured."""
    sweep = sweep_of([REFUSED])
    write_run(tmp_path, sweep, {REFUSED.name: result(REFUSED)})
    assert [outcome.status for outcome in load_outcomes(sweep, tmp_path)] == [Status.OK]


def test_an_interrupted_scenario_is_missing(tmp_path: Path) -> None:
    sweep = sweep_of([ONE, CUT_OFF])
    write_run(tmp_path, sweep, {ONE.name: None, CUT_OFF.name: result(CUT_OFF, status=Status.RUNNING)})
    (tmp_path / f"{sweep.run_id}_{ONE.name}.json").touch()  # reserved, nothing written yet
    outcomes = load_outcomes(sweep, tmp_path)
    assert [outcome.status for outcome in outcomes] == [Status.MISSING, Status.MISSING]
    assert outcomes[0].reason == "it was interrupted before anything was written"
    assert outcomes[1].reason == "it was interrupted after 3 measured refits"


def test_a_result_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """It is missing from the figures, and the reason is not that the run was interrupted."""
    sweep = sweep_of([ONE])
    write_run(tmp_path, sweep, {ONE.name: None})
    path = tmp_path / f"{sweep.run_id}_{ONE.name}.json"
    path.write_text('{"run_id": "x", "schema_version": 99}')
    (outcome,) = load_outcomes(sweep, tmp_path)
    assert outcome.status is Status.MISSING
    assert str(outcome.reason).startswith(f"{path} is no result file of this benchmark (schema version 99 ")


def test_counts() -> None:
    assert counts_line([]) == "0 scenarios: none"


def test_a_run_is_found_by_folder_parent_file_and_id(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    sweeps = [sweep_of([ONE], f"run{number}") for number in (1, 2)]
    for sweep in sweeps:
        write_run(logs, sweep, {ONE.name: result(ONE)})
    assert find_run(logs).sweep == sweeps[1]
    assert find_run(tmp_path).sweep == sweeps[1]
    assert find_run(tmp_path, "run1").sweep == sweeps[0]
    assert find_run(logs / "run1_sweep.json").sweep == sweeps[0]
    with pytest.raises(UsageError, match="no run 'run3': there are run1, run2"):
        find_run(logs, "run3")
    with pytest.raises(UsageError, match="is run run1, not run2"):
        find_run(logs / "run1_sweep.json", "run2")
    with pytest.raises(UsageError, match="does not exist"):
        find_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no results"):
        find_run(tmp_path / "empty")


def test_single_results_stand_beside_each_other_oldest_first(tmp_path: Path) -> None:
    write_result(tmp_path / "later.json", result(ONE))
    write_result(tmp_path / "earlier.json", result(TWO, started="2026-01-25T00:00:00+00:00"))
    (tmp_path / "reserved.json").touch()
    run = find_run(tmp_path)
    assert not run.is_sweep
    assert [(outcome.planned.name, outcome.status) for outcome in run.outcomes] == [
        ("reserved", Status.MISSING),
        ("earlier", Status.OK),
        ("later", Status.OK),
    ]
    assert run.outcomes[1].planned.source == TWO.source
    assert (run.sweep.nodes, run.sweep.num_gpus, run.sweep.jobs) == (16, 128, ("9876543",))
    assert summary_text(run.sweep, run.outcomes).startswith("Refit Benchmark Summary\n====")
    (tmp_path / "other.json").write_text('{"a": 1}')
    again = find_run(tmp_path)
    assert again.outcomes == run.outcomes
    assert [error.path.name for error in again.skipped] == ["other.json"]
    assert again.skipped[0].reason == "is no result file of this benchmark (it holds no result)"


def test_a_run_that_died_early_shows_the_layouts_it_was_started_with(tmp_path: Path) -> None:
    early = result(ONE, status=Status.FAILED, measurements={}, failure=Failure("out of memory", 3, "build"))
    write_result(tmp_path / "early.json", early)
    write_result(tmp_path / "earliest.json", replace(early, scenario=None, environment=None))
    run = find_run(tmp_path)
    text = summary_text(run.sweep, run.outcomes)
    assert "not a valid layout" not in text
    assert "  Source: TP=8, EP=8 (64 GPUs)\n  Target: TP=8, EP=4 (32 GPUs)" in text
    assert "  Source: unknown, the run ended before it recorded its layouts" in text


def test_ranks_on_cpus_are_not_called_gpus(tmp_path: Path) -> None:
    write_run(tmp_path, sweep_of([ONE]), {ONE.name: result(ONE, device="cpu")})
    run = find_run(tmp_path)
    text = summary_text(run.sweep, run.outcomes)
    assert "GPU" not in text
    assert f"Total ranks, on CPUs: {run.sweep.num_gpus}\n" in text
    assert "  Source: TP=8, EP=8 (64 ranks)\n" in text
    assert " between ranks, " in text
    assert f"{run.sweep.num_gpus} ranks on CPUs" in markdown_report(run)


def test_the_command_reports_failures_without_failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_run(tmp_path)
    parser = argparse.ArgumentParser()
    report.add(parser.add_subparsers())
    args = parser.parse_args(["report", str(tmp_path)])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "9 scenarios: 2 ok, 1 wrong data, 1 failed, 1 waived, 1 refused, 1 skipped, 2 missing" in shown
    assert "Analysis:" in shown
    args = parser.parse_args(["report", str(tmp_path), "--format", "csv"])
    assert args.run(args) == 0
    assert capsys.readouterr().out.startswith("directory,run_id,scenario,engine,date,status,reason,valid,model,")


def test_a_side_names_what_is_not_the_default() -> None:
    layout = Layout(tp=2, ep=4, etp=1, pp=2, world_size=16, vpp=3)
    assert side_text(SideSpec(layout), Status.OK) == "TP=2, EP=4, ETP=1, PP=2, VPP=3 (16 GPUs)"
    assert side_text(SideSpec(replace(layout, etp=2, vpp=1)), Status.OK) == "TP=2, EP=4, PP=2 (16 GPUs)"


def test_training_steps_alone_have_no_target() -> None:
    entry = planned("steps", side(2, 1), mode="collocated", method="gloo")
    entry = replace(entry, cost=None, scenario=replace(scenario(entry), measurements=("train-step",)))
    text = summary_text(sweep_of([entry]), [Outcome(entry, Status.MISSING, "it was not started", None)])
    assert "  Source: TP=2, EP=1 (2 GPUs)\n  Measured: train-step\nMISSING" in text
    row = next(line for line in sweep_text(sweep_of([entry])).splitlines() if line.startswith("steps"))
    assert row.split()[-4:] == ["TP2", "EP1", "-", "-"]
    refit = planned("refit", side(2, 1))
    assert "Target: " in summary_text(sweep_of([refit]), [Outcome(refit, Status.MISSING, "it was not started", None)])
