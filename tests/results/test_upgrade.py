"""Result files of older versions: every figure is in its new place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from refit.commands import main
from refit.config.layout import Layout
from refit.config.side import SideSpec
from refit.plan.cost import Bound
from refit.results.refit import EngineResult, ForwardCheck, ModelFacts, RefitResult
from refit.results.result import Environment, Failure, Result, decoded_result, read_result
from refit.results.status import Status
from refit.results.upgrade import RESULT_VERSION
from tests.results.full import GOLDEN, written
from tests.results.older import check_same_figures


@pytest.mark.parametrize("version", [1, 2])
def test_the_report_of_an_older_result_has_the_figures_it_had(version: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(GOLDEN / f"result_{version}.json"), "--format", "csv"]) == 0
    check_same_figures(GOLDEN / f"result_{version}.csv", capsys.readouterr().out)


def test_a_result_of_version_2_has_everything_in_its_new_place() -> None:
    run = read_result(GOLDEN / "result_2.json")
    assert (run.schema_version, run.status, run.exit_code, run.world_size, run.device) == (4, Status.OK, 0, 3, "cpu")
    scenario, refit = run.scenario, run.refit
    assert scenario is not None
    assert scenario.model is not None
    assert scenario.model.experts is not None
    assert scenario.source == SideSpec(Layout(1, 1, 1, 1, 1))
    assert scenario.destination == SideSpec(Layout(1, 2, 1, 1, 2, first_rank=1))
    assert (scenario.engines, scenario.measurements, scenario.method) == (("refit", "megatron"), ("refit",), "gloo")
    assert (scenario.num_warmup, scenario.num_iterations, scenario.check_forward) == (1, 2, True)
    assert (scenario.method_options, scenario.model_name, scenario.recorded) == ({}, "tiny", {"seq-length": 128})
    assert scenario.model.experts.layers == (True,)
    assert refit is not None
    assert refit.model == ModelFacts(2231040, 12, ("bfloat16",))
    assert refit.bound == Bound(
        "h200_nvlink", 1.4778598465473145e-05, "rank 0 sends 5.78 MB within its node at 391 GB/s"
    )
    assert refit.plan is not None
    assert (refit.plan.busiest.rank, refit.plan.busiest.direction, refit.plan.busiest.nbytes) == (0, "sends", 5778432)
    assert refit.plan.received_by_rank == {1: 2889216, 2: 2889216}
    assert refit.plan.source_weights_by_rank == {0: 4462080}
    assert refit.plan.num_transfers == 24
    assert refit.tested is refit.engines["refit"]
    assert refit.tested.forward == ForwardCheck(True, None, 1.0, 0.0, 25.5)
    baseline = refit.baselines["megatron"]
    assert (baseline.status, len(baseline.wrong), baseline.num_wrong) == (Status.WRONG_DATA, 6, 2358180)
    assert baseline.wrong[0].first_index == (4, 0, 0)
    assert baseline.forward is not None
    assert not baseline.forward.passed
    assert run.environment is not None
    assert run.environment.host == "node1"


def test_an_older_result_that_is_written_again_has_the_version_of_today(tmp_path: Path) -> None:
    for version in (1, 2):
        run = read_result(GOLDEN / f"result_{version}.json")
        path = written(run, tmp_path)
        assert json.loads(path.read_text())["schema_version"] == RESULT_VERSION
        assert read_result(path) == run


@pytest.mark.parametrize("engine", ["refit", "megatron"])
def test_one_engine_of_an_older_result(engine: str, tmp_path: Path) -> None:
    content = json.loads((GOLDEN / "result_2.json").read_text())
    content["scenario"]["engine"] = engine
    content["engines"] = {engine: {**content["engines"][engine], "summary": {}}}
    run = decoded_result(content)
    assert run.scenario is not None
    assert run.scenario.engines == (engine,)
    assert run.refit is not None
    assert run.refit.tested == run.refit.engines[engine]
    assert run.refit.engines[engine].summary is None


def test_not_a_number_in_an_older_result_is_read(tmp_path: Path) -> None:
    """Versions 1 and 2 wrote NaN, which is no JSON."""
    text = (GOLDEN / "result_2.json").read_text()
    path = tmp_path / "old.json"
    path.write_text(text.replace('"found": ', '"found": NaN, "was": ', 1))
    found = read_result(path).refit
    assert found is not None
    value = found.engines["megatron"].wrong[0].found
    assert value is not None
    assert math.isnan(value)


@pytest.mark.parametrize("version", [{}, {"schema_version": 2}, {"schema_version": 3}])
def test_a_run_that_died_early_leaves_a_failure_alone(version: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    failure = {"rank": 1, "phase": "build", "message": "killed"}
    path.write_text(json.dumps({**version, "run_id": "run", "status": "failed", "exit_code": 4, "failure": failure}))
    expected = Result("run", status=Status.FAILED, exit_code=4, failure=Failure("killed", 1, "build"))
    assert read_result(path) == expected


def test_an_older_result_from_before_the_plan(tmp_path: Path) -> None:
    """The first edition reserved its file with an empty scenario."""
    content = {"schema_version": 2, "run_id": "run", "scenario": {}, "environment": {"host": "node1"}, "layouts": {}}
    content |= {"bytes": {}, "plan": {}, "bound": None, "engines": {}, "status": "running", "failure": None}
    expected = Result("run", environment=Environment(host="node1"))
    assert decoded_result(content) == expected
    measured = decoded_result(content | {"engines": {"refit": {"status": "ok", "bottleneck_gb_per_s": 5}}})
    assert measured.refit == RefitResult(engines={"refit": EngineResult(Status.OK, bottleneck_gb_per_s=5)})


def test_upgrading_leaves_what_was_given_as_it_is() -> None:
    content = json.loads((GOLDEN / "result_2.json").read_text())
    content["failure"] = {"rank": 1}
    before = json.dumps(content)
    run = decoded_result(content)
    assert json.dumps(content) == before
    assert run.failure == Failure("", 1)
