"""Result files: what is written is read back."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from refit.config.scenario import Mode, Scenario
from refit.results.refit import EngineResult, RefitResult
from refit.results.result import Environment, Failure, Result, ResultFile, decoded_result, encoded, read_result
from refit.results.status import Status
from refit.results.upgrade import RESULT_VERSION
from tests.report.factories import planned, result
from tests.results.full import ENGINE, FULL, REFIT, written


def test_a_full_result_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_result(written(FULL, tmp_path)) == FULL


def test_the_full_result_leaves_no_field_at_its_default() -> None:
    """A field that is added must be set in FULL, or the round trip says nothing about it."""
    assert FULL.scenario is not None
    source, destination = FULL.scenario.source, FULL.scenario.destination
    plain = Scenario(FULL.scenario.model, source, destination, Mode.COLLOCATED, "gloo")
    pairs: list[tuple[Any, Any]] = [(FULL, Result("")), (REFIT, RefitResult()), (ENGINE, EngineResult())]
    pairs += [(FULL.scenario, plain), (FULL.environment, Environment())]
    unset = {
        f"{type(full).__name__}.{field.name}"
        for full, other in pairs
        for field in fields(full)
        if getattr(full, field.name) == getattr(other, field.name)
    }
    assert unset == {"Result.schema_version", "Scenario.model", "Scenario.source", "Scenario.destination"}


def test_a_result_without_anything_comes_back_as_it_was(tmp_path: Path) -> None:
    empty = Result("run")
    assert read_result(written(empty, tmp_path)) == empty
    bare = replace(FULL, measurements={"refit": RefitResult(engines={"refit": EngineResult()})}, scenario=None)
    assert read_result(written(bare, tmp_path)) == bare


def test_a_file_says_its_version_and_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    nan = replace(REFIT, engines={"refit": replace(ENGINE, wrong=(replace(ENGINE.wrong[0], found=math.nan),))})
    path = written(replace(FULL, measurements={"refit": nan}), tmp_path)
    text = path.read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert text.endswith("}\n")
    assert content["schema_version"] == RESULT_VERSION
    assert content["measurements"]["refit"]["plan"]["received_by_rank"] == {"1": 150, "2": 50}
    assert content["scenario"]["output_dir"] == "some where/results"
    assert (content["status"], content["scenario"]["mode"]) == ("wrong_data", "non-collocated")


def test_a_value_that_is_not_a_number_becomes_none() -> None:
    wrong = replace(ENGINE.wrong[0], expected=math.nan, found=math.nan)
    engines = {"refit": replace(ENGINE, wrong=(wrong,))}
    run = replace(FULL, measurements={"refit": replace(REFIT, engines=engines)})
    found = decoded_result(json.loads(encoded(run))).refit
    assert found is not None
    assert found.engines["refit"].wrong == (replace(wrong, expected=None, found=None),)


def test_what_an_unregistered_measurement_left_stays_as_it_is(tmp_path: Path) -> None:
    raw = {"status": "ok", "loss": [1.5, None], "by_rank": {"0": 1}}
    path = written(replace(FULL, measurements={"later": raw, "refit": REFIT}), tmp_path)
    found = read_result(path)
    assert found.measurements == {"later": raw, "refit": REFIT}
    assert read_result(written(found, tmp_path)) == found
    assert found.refit == REFIT
    assert replace(found, measurements={"later": raw}).refit is None


def test_a_value_without_a_place_in_json_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="a complex has no place in a result file"):
        encoded(replace(FULL, measurements={"later": 1j}))


def test_a_reserved_file_is_a_running_result(tmp_path: Path) -> None:
    file = ResultFile.create(tmp_path, "run")
    assert read_result(file.path) == Result("run", status=Status.RUNNING)


def test_a_run_records_what_it_was_asked_for_before_it_builds_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies while it builds its models leaves a result that still has its layouts."""
    torch = pytest.importorskip("torch")
    from refit.bench import runner
    from refit.bench.session import Session
    from refit.transport.ranks import Ranks

    def fail(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(runner, "build_side", fail)
    assert FULL.scenario is not None
    assert FULL.environment is not None
    file = ResultFile.create(tmp_path, "run")
    ranks = Ranks(0, 4, torch.distributed.HashStore(), ("host",) * 4)
    session = Session(FULL.scenario, ranks, torch.device("cpu"), None, FULL.environment)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        runner.benchmark(session, file)
    file.mark_failed(4, Failure("too large", 0, "build"))
    found = read_result(file.path)
    assert (found.status, found.scenario, found.environment) == (Status.FAILED, FULL.scenario, FULL.environment)


def test_what_is_still_being_measured_does_not_hide_a_failure(tmp_path: Path) -> None:
    """The rank that writes is told of the failure by another one, which has marked the file already."""
    running = replace(FULL, status=Status.RUNNING, exit_code=None, failure=None)
    file = ResultFile(written(running, tmp_path))
    other: ResultFile = pickle.loads(pickle.dumps(file))
    assert other.mark_failed(4, Failure("killed", 2))
    file.write(running)
    assert file.mark_failed(4, Failure("killed", 2)), "the other mark was written over"
    file.write(running)
    assert read_result(file.path).failure == Failure("killed", 2)


def test_a_failure_noted_by_another_rank_keeps_the_measurements(tmp_path: Path) -> None:
    file = ResultFile(written(replace(FULL, status=Status.RUNNING, exit_code=None, failure=None), tmp_path))
    assert file.mark_failed(4, Failure("killed", 2))
    assert not file.mark_failed(4, Failure("lost the store", 0)), "the first failure stands"
    found = read_result(file.path)
    assert (found.status, found.exit_code, found.failure) == (Status.FAILED, 4, Failure("killed", 2))
    assert found.measurements == FULL.measurements
    file.path.write_text("")
    file.mark_failed(4, Failure("killed"))
    assert replace(read_result(file.path), finished=None) == Result(
        "run", status=Status.FAILED, exit_code=4, failure=Failure("killed")
    )


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (Failure("killed"), "killed"),
        (Failure("two\n lines", 3), "rank 3: two lines"),
        (Failure("killed", 0, "plan"), "rank 0, phase 'plan': killed"),
        (Failure("", 3), ""),
    ],
)
def test_a_failure_in_one_line(failure: Failure, text: str) -> None:
    assert str(failure) == text


def test_the_times_of_an_engine() -> None:
    assert (ENGINE.warmup_s, ENGINE.measured_s) == ([0.3], [0.3])
    assert (ENGINE.num_compared, ENGINE.num_wrong) == (200, 7)
    assert ENGINE.cold_total_s == pytest.approx(0.6)
    assert (ENGINE.median_s, EngineResult().median_s) == (0.3, None)


def test_a_result_of_the_factories_comes_back_too(tmp_path: Path) -> None:
    run = result(planned("run"), bound_s=0.04)
    assert read_result(written(run, tmp_path)) == run
