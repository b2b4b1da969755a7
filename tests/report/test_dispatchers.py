"""Pairs of dispatchers: which cells are compared, when their work counts as equal, and what the table says."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.config.scenario import Mode, Scenario
from refit.config.steps import Dispatch, StepSettings
from refit.report.dispatchers import LOSS_BAR, arm_of, dispatcher_text, faster_by, pairings
from refit.report.step_tables import curve_text, index_text, write_step_tables
from refit.results.outcomes import Outcome, judged
from refit.results.result import Result, converted, encoded
from refit.results.runs import find_run
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import StepResult, StepSample, count_stalls
from tests.report.factories import ENVIRONMENT, MODEL, planned, side

CONFIG = {"num_layers": "2", "moe_expert_capacity_factor": "None", "moe_token_dispatcher_type": "alltoall"}


def outcome(
    arm: str,
    mean_s: float,
    micro: int = 1,
    overlap: bool = False,
    losses: tuple[float, ...] = (5.0, 4.0, 3.0),
    **changes: Any,
) -> Outcome:
    """A run of training steps with one warm-up step, all steps of `mean_s` seconds."""
    dispatcher, _, backend = arm.partition("/")
    steps = StepSettings(micro, 16, 64, dispatch=Dispatch(dispatcher, backend or None, overlap=overlap))
    samples = tuple(
        StepSample(number, number == 0, (mean_s * 0.9, mean_s), 1, changes.pop("tokens", 1024), loss, 1.0)
        for number, loss in enumerate(losses)
    )
    config = {**CONFIG, "moe_token_dispatcher_type": dispatcher, **changes.pop("config", {})}
    result = StepResult(
        status=Status.OK,
        num_ranks=2,
        sequences_per_step=16,
        flops_per_step=1e12,
        config=config,
        samples=samples,
        summary=summarise([sample.seconds for sample in samples if not sample.warmup]),
    )
    scenario = Scenario(
        MODEL, side(1, 2), side(1, 2), Mode.COLLOCATED, "gloo", measurements=("train-step",), steps=steps,
        run_name=f"{arm}-{micro}",
    )  # fmt: skip
    name = f"{'on' if overlap else 'off'}_{micro}_{dispatcher}"
    run = Result(
        name, status=Status.OK, exit_code=0, scenario=scenario, environment=changes.pop("environment", ENVIRONMENT),
        measurements={"train-step": result},
    )  # fmt: skip
    assert not changes
    return Outcome(planned(name), Status.OK, None, run)


def test_cells_that_differ_in_the_dispatcher_alone_are_paired() -> None:
    cells = [outcome(arm, 1.0, micro, overlap) for overlap in (True, False) for micro in (4, 1)
             for arm in ("flex/deepep", "alltoall")]  # fmt: skip
    found = pairings(cells)
    assert [(pair.first.steps.dispatch.overlap, pair.first.steps.micro_batch_size) for pair in found] == [
        (False, 1), (False, 4), (True, 1), (True, 4),
    ]  # fmt: skip
    assert all((pair.first.name, pair.second.name) == ("alltoall", "flex/deepep") for pair in found)
    assert all(pair.work.is_equal for pair in found)


def test_the_documents_figures() -> None:
    """12.54 s against 14.12 s is +12.6 %, and 9.77 s against 6.26 s is -36 %, as the campaign on 256 GPUs has it."""
    text = dispatcher_text(
        [
            outcome("alltoall", 12.54),
            outcome("flex/deepep", 14.12),
            outcome("alltoall", 9.77, 4),
            outcome("flex/deepep", 6.26, 4),
        ]
    )
    rows = [line.split()[2:] for line in text.splitlines() if " off " in line and "work" not in line]
    assert rows[0][:5] == ["1", "off", "12540.00", "14120.00", "+12.6"]
    assert rows[1][:7] == ["4", "off", "9770.00", "6260.00", "-35.9", "flex/deepep", "35.9"]
    assert "micro-batch 4, overlap off, alltoall and flex/deepep: equal work: 3 fields" in text
    assert f"bar {LOSS_BAR:.1e}" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"losses": (5.0, 4.0, 3.0 * (1 + 5e-4))}, "losses differ by 5.0e-04, more than 4.1e-04"),
        ({"losses": ()}, "no losses"),
        ({"config": {"num_layers": "3"}}, "differ in more than the dispatcher: num_layers: 2 / 3"),
        ({"config": {"moe_expert_capacity_factor": "1.0"}}, "allgather may drop tokens"),
        ({"tokens": 512}, "tokens differ"),
        ({"environment": replace(ENVIRONMENT, versions={"torch": "2.12.0"})}, "versions or GPUs differ"),
    ],
    ids=["losses", "no-losses", "config", "drops", "tokens", "versions"],
)
def test_unequal_work_has_no_delta(change: dict[str, Any], reason: str) -> None:
    if change.get("losses") == ():
        other = outcome("allgather", 1.0)
        assert other.result is not None
        steps: StepResult = other.result.measurements["train-step"]
        without = replace(steps, samples=tuple(replace(sample, loss=None) for sample in steps.samples))
        other = replace(other, result=replace(other.result, measurements={"train-step": without}))
    else:
        other = outcome("allgather", 1.0, **change)
    cells = [outcome("alltoall", 2.0), other]
    (pair,) = pairings(cells)
    assert pair.delta is None
    text = dispatcher_text(cells)
    assert "NOT EQUAL" in text
    assert reason in text
    assert "-50.0" not in text


def test_a_loss_within_the_bar_is_equal_work() -> None:
    (pair,) = pairings([outcome("alltoall", 2.0), outcome("allgather", 1.0, losses=(5.0, 4.0, 3.0 * (1 + 4e-4)))])
    assert pair.work.is_equal
    assert pair.delta == -0.5
    assert faster_by(pair, -0.5) == "allgather 50.0 %"
    assert faster_by(pair, 1.0) == "alltoall 50.0 %"


def test_other_cells_are_not_paired() -> None:
    assert pairings([outcome("alltoall", 1.0), outcome("allgather", 1.0, micro=2)]) == []
    assert pairings([outcome("alltoall", 1.0), outcome("allgather", 1.0, overlap=True)]) == []
    assert dispatcher_text([outcome("alltoall", 1.0)]) == ""
    failed = replace(outcome("allgather", 1.0), status=Status.FAILED)
    assert arm_of(failed) is None


def test_tables_have_a_row_for_every_run_and_step(tmp_path: Path) -> None:
    missing = Outcome(planned("late"), Status.MISSING, "it was not started", None)
    cells = [outcome("alltoall", 2.0), missing]
    rows = list(csv.DictReader(io.StringIO(index_text(cells))))
    assert [(row["name"], row["status"], row["mean_s"]) for row in rows] == [
        ("off_1_alltoall", "ok", "2.0"),
        ("late", "missing", ""),
    ]
    assert float(rows[0]["tflops_per_gpu"]) == 0.25
    paths = write_step_tables(cells, tmp_path, "run")
    assert [path.name for path in paths] == [
        "run_index.csv", "run_off_1_alltoall_loss_curve.csv", "run_off_1_alltoall_steps.json",
    ]  # fmt: skip
    curve = list(csv.DictReader(paths[1].open()))
    assert [row["loss"] for row in curve] == ["5.0", "4.0", "3.0"]
    assert write_step_tables([missing], tmp_path, "none") == []
    assert curve_text(StepResult()).count("\n") == 0


def test_tables_beside_single_results_are_not_taken_for_results(tmp_path: Path) -> None:
    found = outcome("alltoall", 2.0)
    assert found.result is not None
    (tmp_path / "off_1_alltoall.json").write_text(encoded(found.result))
    write_step_tables([found], tmp_path, "run")
    run = find_run(tmp_path)
    assert [each.planned.name for each in run.outcomes] == ["off_1_alltoall"]
    assert not run.skipped


def test_results_are_read_as_they_were_written() -> None:
    found = outcome("alltoall", 2.0)
    assert found.result is not None
    steps = found.result.measurements["train-step"]
    import json

    assert converted(json.loads(encoded(steps)), StepResult) == steps
    assert judged(found.planned, found.result).status in (Status.OK, Status.MISSING)


def test_stalls_are_steps_of_more_than_three_medians() -> None:
    assert count_stalls([1.0, 1.0, 1.0, 3.0, 3.1]) == 1


def test_pictures_of_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from refit.report.plots.steps import crossover_figure, losses_figure

    cells = [outcome(arm, mean, micro) for micro, mean in ((1, 2.0), (4, 1.0)) for arm in ("alltoall", "allgather")]
    cells.append(replace(outcome("alltoall", 9.0, 2), planned=planned("alone")))
    axes = crossover_figure(pairings(cells), "under").axes[0]
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()] == [
        ("TP1 EP2, allgather", [1, 4], [2000.0, 1000.0]),
        ("TP1 EP2, alltoall", [1, 4], [2000.0, 1000.0]),
    ]
    arms = [arm for cell in cells if (arm := arm_of(cell)) is not None]
    curves = losses_figure(arms, "under").axes[0].get_lines()
    assert [curve.get_label() for curve in curves] == [arm.outcome.planned.name for arm in arms]
