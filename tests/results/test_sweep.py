"""Sweep files: what is written is read back, version 1 too, and what is no sweep is one error with its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from refit.config.shape import Dtype
from refit.errors import UsageError
from refit.plan.cost import Bound
from refit.report.refits.sweep_table import sweep_text
from refit.results.status import Status
from refit.results.sweep import Planned, Sweep, next_attempt, sweep_file
from refit.results.upgrade import SWEEP_VERSION
from tests.report.factories import cost, on_ranks_from, planned, side, sweep_of
from tests.results.older import check_same_figures

GOLDEN = Path(__file__).parent / "golden"

READY = planned(
    "ready",
    replace(side(2, 2), dtype=Dtype.FP16),
    replace(side(2, 1), dtype=None, transformer_impl="transformer_engine"),
    flags=("--model=tiny", "--split=it's 99,1,0"),
    cost=replace(cost({0: 7, 1: 0}, {4: 7}, 10, 3), casts={"a": ("float32", "bfloat16")}, local_by_rank={4: 3}),
    bound=Bound("mine", 0.25, "rank 4 receives 7 bytes"),
    memory_bytes=1 << 30,
    notes=("a choice",),
)
REFUSED = planned("refused", cost=None, status=Status.REFUSED, reason="too large")
SKIPPED = replace(planned("skipped", cost=None, status=Status.SKIPPED, reason="no"), source=None, destination=None)
SWEEP = sweep_of([READY, REFUSED, SKIPPED], "run")


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "run_sweep.json"
    path.write_text(json.dumps(content))
    return path


def first_edition() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "sweep_1.json").read_text())
    return content


def error(path: Path) -> str:
    """The message of the one UsageError that reading `path` raises. It names the file and is one line."""
    with pytest.raises(UsageError) as caught:
        Sweep.read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("sweep", [SWEEP, replace(SWEEP, jobs=(), cluster=None, scenarios=())])
def test_a_sweep_comes_back_as_it_was(sweep: Sweep, tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "run")
    sweep.write(path)
    assert Sweep.read(path) == sweep
    assert json.loads(path.read_text())["schema_version"] == SWEEP_VERSION
    assert [file.name for file in tmp_path.iterdir()] == ["run_sweep.json"]


def test_a_sweep_of_version_1_has_everything_in_its_new_place() -> None:
    sweep = Sweep.read(GOLDEN / "sweep_1.json")
    assert (sweep.schema_version, sweep.run_id, sweep.jobs, sweep.cluster) == (3, "sweep_1", ("77",), "h200_nvlink")
    ready, shared, refused, skipped = sweep.scenarios
    assert (ready.source, ready.destination) == tuple(
        replace(each, dtype=None) for each in (side(1, 1), on_ranks_from(1, side(1, 2)))
    )
    assert shared.destination == replace(side(1, 2), dtype=None)
    assert ready.bound == Bound(
        "h200_nvlink", 1.4778598465473145e-05, "rank 0 sends 5.78 MB within its node at 391 GB/s"
    )
    costs = [each.cost for each in (ready, shared)]
    assert [
        (cost.busiest.rank, cost.busiest.direction, cost.busiest.nbytes, cost.payload_bytes, cost.local_bytes)
        for cost in costs
        if cost is not None
    ] == [(0, "sends", 5778432, 5778432, 0), (1, "receives", 2228224, 5778432, 2108416)]
    assert (refused.status, refused.cost, refused.bound, refused.memory_bytes) == (Status.REFUSED, None, None, None)
    assert skipped.status is Status.SKIPPED
    assert ready.flags[:2] == ("--model=tiny", "--num-layers=1")


def test_the_table_of_an_older_sweep_is_the_one_it_had() -> None:
    assert (
        sweep_text(Sweep.read(GOLDEN / "sweep_1.json"), width=160) + "\n" == (GOLDEN / "sweep_1_plan.txt").read_text()
    )


def test_the_report_of_an_older_sweep_has_the_figures_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(GOLDEN / "sweep_1.json", tmp_path / "sweep_1_sweep.json")
    shutil.copy(GOLDEN / "result_2.json", tmp_path / "sweep_1_ready.json")
    assert main(["report", str(tmp_path), "--format", "csv"]) == 0
    check_same_figures(GOLDEN / "sweep_1.csv", capsys.readouterr().out)


def test_an_older_sweep_that_is_written_again_has_the_version_of_today(tmp_path: Path) -> None:
    sweep = Sweep.read(GOLDEN / "sweep_1.json")
    path = tmp_path / "sweep_1_sweep.json"
    sweep.write(path)
    assert json.loads(path.read_text())["schema_version"] == SWEEP_VERSION
    assert Sweep.read(path) == sweep


def test_an_older_sweep_without_a_cluster_or_a_layout(tmp_path: Path) -> None:
    content = first_edition() | {"cluster": None}
    content["scenarios"] = [content["scenarios"][0] | {"lower_bound_s": None, "limited_by": None}]
    content["scenarios"] += [content["scenarios"][0] | {"source": None, "destination": None, "bytes": None}]
    with_layout, without = Sweep.read(written(tmp_path, content)).scenarios
    assert with_layout.bound is None
    assert with_layout.cost is not None
    assert (without.source, without.destination, without.cost) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it holds no scenarios"),
        ([], "it holds no scenarios"),
        ({"schema_version": 2}, "it holds no scenarios"),
        ({"scenarios": []}, "schema version None is not one of 1 to 3"),
        ({"schema_version": 4, "scenarios": []}, "schema version 4 is not one of 1 to 3"),
        ({"schema_version": 2, "scenarios": []}, "Object missing required field `run_id`"),
        ({"schema_version": 1, "scenarios": None}, "schema version 1: 'NoneType' object is not iterable"),
        ({"schema_version": 1, "scenarios": [{}]}, "schema version 1, scenario 1: field 'mode' is missing"),
        ({"schema_version": 1, "scenarios": ["a"]}, "schema version 1, scenario 1: "),
    ],
)
def test_what_is_no_sweep_file(content: object, reason: str, tmp_path: Path) -> None:
    message = error(written(tmp_path, content))
    assert f"is no sweep file of this benchmark ({reason}" in message
    assert message.endswith("): begin a new sweep")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("status", "odd", "Invalid enum value 'odd' - at `$.scenarios[1].status`"),
        ("num_ranks", "6", "Expected `int`, got `str` - at `$.scenarios[1].num_ranks`"),
        ("flags", None, "Expected `array`, got `null` - at `$.scenarios[1].flags`"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_field_is_named(version: int, field: str, value: object, reason: str, tmp_path: Path) -> None:
    content = first_edition()
    if version == 2:
        SWEEP.write(sweep_file(tmp_path, "run"))
        content = json.loads(sweep_file(tmp_path, "run").read_text())
    content["scenarios"][1][field] = value
    assert reason in error(written(tmp_path, content))


def test_a_missing_size_of_an_older_sweep_is_named(tmp_path: Path) -> None:
    content = first_edition()
    del content["scenarios"][0]["bytes"]["busiest_rank"]
    assert "(schema version 1, scenario 1: field 'busiest_rank' is missing)" in error(written(tmp_path, content))


def test_damaged_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, None)
    path.write_text('{"schema_version": 2, ')
    assert "line 1 column 23" in error(path)
    assert "cannot be read: No such file or directory" in error(tmp_path / "none.json")


def test_an_unknown_scenario_is_refused_with_the_names_there_are() -> None:
    assert SWEEP.scenario("ready") is READY
    with pytest.raises(UsageError, match="sweep run has no scenario 'gone': there are ready, refused, skipped"):
        SWEEP.scenario("gone")


def test_an_attempt_without_a_readable_result_has_none(tmp_path: Path) -> None:
    attempt = next_attempt(tmp_path, "run", "ready")
    assert (attempt.exists, attempt.has_result, attempt.result()) == (False, False, None)
    attempt.json.touch()
    assert (attempt.exists, attempt.has_result, attempt.result()) == (True, False, None)
    attempt.json.write_text("{")
    assert (attempt.exists, attempt.has_result, attempt.result()) == (True, True, None)
    attempt.json.write_text('{"run_id": "run_ready", "status": "ok"}')
    found = attempt.result()
    assert found is not None
    assert found.status is Status.OK


def test_planned_fields_with_defaults_may_be_missing(tmp_path: Path) -> None:
    SWEEP.write(sweep_file(tmp_path, "run"))
    content = json.loads(sweep_file(tmp_path, "run").read_text())
    for name in ("reason", "cost", "bound", "memory_bytes", "notes"):
        del content["scenarios"][0][name]
    (first, *_) = Sweep.read(written(tmp_path, content)).scenarios
    assert first == Planned(
        **{
            name: getattr(READY, name)
            for name in ("name", "flags", "source", "destination", "mode", "method", "num_ranks", "nodes")
        },
        ranks_per_node=READY.ranks_per_node,
        status=Status.READY,
    )
