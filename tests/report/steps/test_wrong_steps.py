"""A training whose loss is not finite: it is read as it was written, every report shows it and none ranks it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from refit.report.steps.arms import arms_of
from refit.report.steps.dispatchers import dispatcher_text, pairings
from refit.report.steps.step_document import document_text
from refit.report.steps.step_lines import not_finite_line, step_line, train_closing_lines
from refit.report.steps.step_tables import curve_text, index_text
from refit.report.steps.trainers import rankings, trainer_text
from refit.results.outcomes import Outcome, judged
from refit.results.result import Result, decoded_result, encoded, read_result
from refit.results.status import Status
from refit.results.step import Breakdown, StepResult
from tests.report.factories import cost, engine, result, write_result
from tests.report.steps import test_dispatchers, test_trainers

REASON = "loss of train step 1/2 is nan (1 of 3 steps is not finite): no time of this run counts"


def wrong(found: Outcome, **not_finite: str) -> Outcome:
    """The outcome of a run like `found` whose first measured step has these values."""
    assert found.result is not None
    assert found.train_step is not None
    samples = list(found.train_step.samples)
    samples[1] = replace(samples[1], **dict.fromkeys(not_finite), not_finite=not_finite)
    steps = replace(found.train_step, samples=tuple(samples), breakdown=None)
    steps = replace(steps, status=Status.WRONG_DATA, reason=not_finite_line(steps))
    measurements = {**found.result.measurements, "train-step": steps}
    return judged(
        found.planned, replace(found.result, status=Status.WRONG_DATA, exit_code=1, measurements=measurements)
    )


def steps_of(found: Outcome) -> StepResult:
    assert found.train_step is not None
    return found.train_step


ALLTOALL = test_dispatchers.outcome("alltoall", 1.0)
ALLGATHER = wrong(test_dispatchers.outcome("allgather", 0.5), loss="nan")


def test_the_first_such_step_is_named() -> None:
    assert (ALLGATHER.status, ALLGATHER.reason) == (Status.WRONG_DATA, REASON)
    steps = steps_of(ALLGATHER)
    assert step_line("train step", steps.samples[1], 2, 1, 2).endswith("(slowest rank 1), loss nan")
    assert train_closing_lines(steps, Result("run"))[-1] == f"FAILED (train step): {REASON}"
    first, *others = steps.samples
    warming = replace(steps, samples=(replace(first, loss=None, not_finite={"loss": "inf"}), *others))
    assert not_finite_line(warming) == (
        "loss of train step warm-up 1/1 is inf (2 of 3 steps are not finite): no time of this run counts"
    )
    norm = replace(first, grad_norm=None, not_finite={"grad_norm": "nan"})
    assert step_line("train step", norm, 1, 1, 2).endswith(", loss 5.000000, gradient norm nan")
    assert str(not_finite_line(replace(steps, samples=(norm,)))).startswith("gradient norm of train step warm-up 1/1 ")
    recorded = replace(steps_of(ALLTOALL), breakdown=Breakdown(1.0, 0, not_finite={"loss": "nan"}))
    assert str(not_finite_line(recorded)).startswith("loss of the recorded step is nan (1 of 4 steps is not finite)")
    assert not_finite_line(replace(recorded, breakdown=Breakdown(1.0, 0))) is None


def test_it_is_neither_paired_nor_ranked() -> None:
    """Nor drawn, though it is faster than all others."""
    assert pairings([ALLTOALL, ALLGATHER]) == []
    assert arms_of([ALLGATHER]) == []
    fast = wrong(test_trainers.outcome("fsdp2", 0.5), grad_norm="inf")
    ((*ranking,),) = rankings([test_trainers.outcome("megatron", 2.0), test_trainers.outcome("autotp", 3.0), fast])
    assert [each.title for each in ranking] == ["megatron TP2 EP1", "autotp TP2 DP2 ZeRO2"]


def test_a_run_of_several_is_named_and_does_not_count() -> None:
    several = test_dispatchers.runs_of("alltoall", 1.0, 9.0, 1.0)
    several[1] = wrong(several[1], loss="nan")
    text = dispatcher_text([*several, *test_dispatchers.runs_of("allgather", 2.0, 2.0)])
    assert "alltoall_run2 is not counted: wrong data: loss of train step 1/3 is nan" in text
    several = test_trainers.runs_of("fsdp2", 1.0, 9.0, 1.0)
    several[1] = wrong(several[1], loss="nan")
    text = trainer_text([*several, *test_trainers.runs_of("megatron", 2.0, 2.0)])
    assert f"fsdp2_run2 is not counted: wrong data: {REASON}" in text


def test_tables_say_nan() -> None:
    first, second = csv.DictReader(io.StringIO(index_text([ALLTOALL, wrong(ALLTOALL, loss="-inf")])))
    assert (first["status"], first["last_loss"]) == ("ok", "3.0")
    assert (second["status"], second["last_loss"]) == ("wrong_data", "3.0")
    assert second["reason"].startswith("loss of train step 1/2 is -inf (")
    assert float(second["mean_s"]) == 1.0
    last = steps_of(ALLGATHER)
    last = replace(last, samples=last.samples[:2])
    (row,) = csv.DictReader(io.StringIO(index_text([replaced(ALLGATHER, last)])))
    assert row["last_loss"] == "nan"
    rows = list(csv.DictReader(io.StringIO(curve_text(steps_of(wrong(ALLTOALL, loss="nan", grad_norm="inf"))))))
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [("5.0", "1.0"), ("nan", "inf"), ("3.0", "1.0")]


def replaced(found: Outcome, steps: StepResult) -> Outcome:
    assert found.result is not None
    return replace(found, result=replace(found.result, measurements={"train-step": steps}))


def test_the_document_of_steps_is_json_that_any_reader_takes() -> None:
    assert ALLGATHER.result is not None
    assert ALLGATHER.result.scenario is not None
    document = json.loads(document_text(ALLGATHER.result.scenario, steps_of(ALLGATHER)), parse_constant=refused)
    assert [step["loss"] for step in document["steps"]] == [None, 3.0]
    assert (document["summary"]["avg_loss"], document["summary"]["final_loss"]) == (None, 3.0)


def refused(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    """Also with a norm of a training that diverges, far beyond the numbers of other fields."""
    assert ALLGATHER.result is not None
    steps = steps_of(wrong(ALLTOALL, loss="nan", grad_norm="inf"))
    steps = replace(steps, samples=(replace(steps.samples[0], loss=1e25, grad_norm=1e300), *steps.samples[1:]))
    run = replace(ALLGATHER.result, measurements={"train-step": steps})
    write_result(tmp_path / "run.json", run)
    assert read_result(tmp_path / "run.json") == run
    json.loads((tmp_path / "run.json").read_text(), parse_constant=refused)


def test_an_older_file_has_nulls_and_is_not_equal_work() -> None:
    """Versions before this status wrote null for NaN, and `ok`."""
    assert ALLGATHER.result is not None
    old: Any = json.loads(encoded(ALLGATHER.result))
    old["status"] = old["measurements"]["train-step"]["status"] = "ok"
    for sample in old["measurements"]["train-step"]["samples"]:
        del sample["not_finite"]
    read = decoded_result(old)
    (pair,) = pairings([ALLTOALL, judged(ALLGATHER.planned, read)])
    assert pair.work.problems == ("losses differ by nan, more than 4.1e-04",)
    assert pair.delta is None


def test_every_report_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also beside a refit in the same run, which is right."""
    assert ALLGATHER.result is not None
    plan = cost({0: 10, 1: 0}, {0: 0, 1: 10})
    refit = result(ALLGATHER.planned, engines={"refit": engine([[0.25, 0.5]])}, plan=plan).measurements
    assert ALLGATHER.result.scenario is not None
    both = replace(
        ALLGATHER.result,
        measurements={**refit, **ALLGATHER.result.measurements},
        scenario=replace(ALLGATHER.result.scenario, measurements=("train-step", "refit")),
    )
    for name, run in {"alone": ALLGATHER.result, "both": both}.items():
        (tmp_path / name).mkdir()
        write_result(tmp_path / name / "run.json", run)
        for form in ("text", "markdown", "html", "csv"):
            assert main(["report", str(tmp_path / name), "--format", form]) == 0
            shown = capsys.readouterr().out
            assert "wrong data" in shown.lower().replace("_", " "), (name, form)
            assert "loss of train step 1/2 is nan" in shown, (name, form)
        assert main(["report", str(tmp_path / name), "--format", "json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["status"], row["valid"], row["reason"]) == ("wrong_data", False, REASON)
        pytest.importorskip("matplotlib")
        assert main(["plot", str(tmp_path / name)]) == 0
        assert "losses.png" not in capsys.readouterr().out
