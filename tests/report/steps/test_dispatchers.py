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
from refit.report.steps.arms import arms_of
from refit.report.steps.dispatchers import LOSS_BAR, dispatcher_text, faster_by, pairings
from refit.report.steps.step_tables import curve_text, index_text, write_step_tables
from refit.results.outcomes import Outcome, judged
from refit.results.result import Result, converted, encoded
from refit.results.runs import find_run
from refit.results.stats import summarise
from refit.results.status import Status
from refit.results.step import StepResult, StepSample, count_stalls
from tests.report.factories import ENVIRONMENT, MODEL, planned, side

GOLDEN = Path(__file__).parents[1] / "golden"
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
    dispatch = Dispatch(dispatcher, backend or None, overlap=overlap, rank_capacity=changes.pop("rank_capacity", None))
    steps = StepSettings(micro, 16, 64, dispatch=dispatch)
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


FOUR_LOSSES = (5.0, 4.0, 3.0, 2.0)
"""Of one step that warms up and three that are measured, the fewest whose spread is judged."""


def runs_of(arm: str, *means_s: float, **changes: Any) -> list[Outcome]:
    """Several runs of one scenario, each with its mean step, with `changes` of all."""
    found = [outcome(arm, mean_s, **{"losses": FOUR_LOSSES, **changes}) for mean_s in means_s]
    return [
        replace(each, planned=planned(f"{arm}_run{number}", run_of=arm)) for number, each in enumerate(found, start=1)
    ]


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
        ({"config": {"moe_expert_rank_capacity_factor": "1.0"}}, "allgather may drop tokens"),
        ({"tokens": 512}, "tokens differ"),
        ({"environment": replace(ENVIRONMENT, versions={"torch": "2.12.0"})}, "versions or GPUs differ"),
    ],
    ids=["losses", "no-losses", "config", "drops", "drops-by-rank", "tokens", "versions"],
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


def test_the_room_of_nccl_ep_drops_nothing() -> None:
    room = {"moe_flex_dispatcher_backend": "ncclep", "moe_expert_rank_capacity_factor": "1.5"}
    (pair,) = pairings([outcome("alltoall", 1.0), outcome("flex/ncclep", 0.9, rank_capacity=1.5, config=room)])
    assert pair.work.is_equal


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
    assert arms_of([failed]) == []


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
    curves = losses_figure(arms_of(cells), "under").axes[0].get_lines()
    assert [curve.get_label() for curve in curves] == [cell.planned.name for cell in cells]


def test_single_runs_are_shown_as_ever() -> None:
    cells = [
        outcome(arm, mean_s, micro, losses=losses)
        for micro, arm, mean_s, losses in (
            (1, "alltoall", 12.54, FOUR_LOSSES),
            (1, "flex/deepep", 14.12, FOUR_LOSSES),
            (4, "alltoall", 9.77, (5.0, 4.0)),
            (4, "flex/deepep", 6.26, (5.0, 4.1)),
        )
    ]
    assert dispatcher_text(cells) + "\n" == (GOLDEN / "dispatchers.txt").read_text()


def test_runs_of_one_scenario_are_one_arm() -> None:
    cells = [*runs_of("alltoall", 1.0, 1.2, 1.1), *runs_of("allgather", 2.2, 2.1, 2.3)]
    (pair,) = pairings(cells)
    assert (pair.first.mean_s, pair.second.mean_s) == (1.1, 2.2)
    assert pair.delta == pytest.approx(1.0)
    assert pair.is_beyond_spread
    text = dispatcher_text(cells)
    (row,) = (line.split() for line in text.splitlines() if " off " in line)
    assert row[4:] == ["1100.00", "2200.00", "+100.0", "alltoall", "50.0", "%", "yes", "9+9", "0", "0.0e+00", "equal"]
    assert (
        "alltoall: 1100.00 ms, median of the means of 3 runs (1000.00, 1200.00, 1100.00), spread 18.2 %; "
        "within a run up to 0.0 % (cv)"
    ) in text
    assert text.count("median of the means") == 2


def test_a_difference_is_judged_by_the_spread_between_runs_too() -> None:
    """Steps of a run do not vary at all; runs do."""
    (pair,) = pairings([*runs_of("alltoall", 1.0, 1.2, 1.1), *runs_of("allgather", 1.15, 1.25, 1.2)])
    assert pair.is_beyond_spread is False
    (pair,) = pairings([*runs_of("alltoall", 1.1), *runs_of("allgather", 1.2)])
    assert pair.is_beyond_spread is True


@pytest.mark.parametrize(
    ("odd", "who"),
    [
        (1, "alltoall_run2 against alltoall_run1: losses differ by 5.0e-04, more than 4.1e-04"),
        (4, "allgather_run3 against alltoall_run1: losses differ by 5.0e-04, more than 4.1e-04"),
    ],
)
def test_a_run_of_other_work_is_named(odd: int, who: str) -> None:
    cells = [*runs_of("alltoall", 1.0, 1.0), *runs_of("allgather", 2.0, 2.0, 2.0)]
    (other,) = runs_of("alltoall" if odd < 2 else "allgather", 1.0, losses=(5.0, 4.0, 3.0 * (1 + 5e-4), 2.0))
    cells[odd] = replace(other, planned=cells[odd].planned)
    (pair,) = pairings(cells)
    assert pair.work.problems == (who,)
    assert pair.delta is None
    assert f"NOT EQUAL work: {who}" in dispatcher_text(cells)


def test_what_all_runs_have_is_said_once() -> None:
    cells = [*runs_of("alltoall", 1.0), *runs_of("allgather", 2.0, 2.0, config={"moe_expert_capacity_factor": "1.0"})]
    drops, config = pairings(cells)[0].work.problems
    assert drops == ("allgather_run1, allgather_run2: allgather may drop tokens: moe_expert_capacity_factor is set")
    assert config.startswith("allgather_run1, allgather_run2 against alltoall_run1: configurations differ")


def test_losses_that_are_no_numbers_are_not_equal_work() -> None:
    nan = float("nan")
    for losses in ((nan, 4.0, 3.0), (5.0, nan, 3.0)):
        (pair,) = pairings([outcome("alltoall", 1.0), outcome("allgather", 1.0, losses=losses)])
        assert pair.work.problems == ("losses differ by nan, more than 4.1e-04",)


def test_a_failed_run_is_named_and_does_not_count(tmp_path: Path) -> None:
    cells = [*runs_of("alltoall", 1.0, 9.0, 1.0), *runs_of("allgather", 2.0, 2.0, 2.0)]
    cells[1] = replace(cells[1], status=Status.FAILED, reason="killed")
    (pair,) = pairings(cells)
    assert pair.delta == 1.0
    text = dispatcher_text(cells)
    assert "alltoall: 1000.00 ms, median of the means of 2 of 3 runs (1000.00, 1000.00)" in text
    assert "alltoall_run2 is not counted: failed: killed" in text
    rows = list(csv.DictReader(io.StringIO(index_text(cells))))
    assert [(row["name"], row["status"]) for row in rows][:2] == [("alltoall_run1", "ok"), ("alltoall_run2", "failed")]
    assert len(rows) == 6
    curves = [path.name for path in write_step_tables(cells, tmp_path, "run") if path.suffix == ".csv"]
    assert curves[1:] == [f"run_{cell.planned.name}_loss_curve.csv" for cell in cells]


def test_pictures_show_every_run() -> None:
    pytest.importorskip("matplotlib")
    from refit.report.plots.steps import crossover_figure, losses_figure

    cells = [*runs_of("alltoall", 1.0, 1.2, 1.1), *runs_of("allgather", 2.0)]
    axes = crossover_figure(pairings(cells), "under").axes[0]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[2000.0], [1100.0]]
    ends = [[y for _, y in path.vertices] for lines in axes.collections for path in lines.get_paths()]
    assert ends == [[2000.0, 2000.0], [1000.0, 1200.0]]
    curves = losses_figure(arms_of(cells), "under").axes[0].get_lines()
    assert [curve.get_label() for curve in curves] == ["alltoall"] * 3 + ["allgather"]
    assert len({curve.get_color() for curve in curves}) == 2
