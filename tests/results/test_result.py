"""Result files: what is written is read back, older versions too, and what is no result is one error with its place."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from refit.config.clusters import Cluster
from refit.config.layout import Layout
from refit.config.placement import ExpertPlacement
from refit.config.scenario import Mode, Scenario, Verify
from refit.config.shape import Dtype, LatentAttention
from refit.config.side import Fsdp2Options, SideSpec, VllmOptions
from refit.config.steps import Dispatch, Recompute, StepSettings
from refit.errors import ExitCode, UsageError
from refit.plan.cost import Bound, Cost
from refit.results.refit import (
    Activity,
    EngineResult,
    ForwardCheck,
    ModelFacts,
    NotMoved,
    QuantisedRefit,
    RefitResult,
    Sample,
    WrongWeights,
)
from refit.results.refit import tested_engine as judged_engine
from refit.results.result import Environment, Failure, Gpu, Result, ResultFile, decoded_result, encoded, read_result
from refit.results.stats import stability, summarise
from refit.results.status import COUNTED, Status, worst
from refit.results.upgrade import RESULT_VERSION
from tests.report.factories import MODEL, planned, result
from tests.results.older import check_same_figures

GOLDEN = Path(__file__).parent / "golden"
"""Files of the first edition, and what its `refit report --format csv` printed of them."""

ENGINE = EngineResult(
    status=Status.WRONG_DATA,
    reason="a reason",
    not_moved=(NotMoved("the dtype changes", 2, 100, 200, ("a", "b")),),
    connect_s=0.5,
    connected="one NCCL communicator of 4 ranks",
    connect_memory_bytes_per_rank=(1, 2, 3),
    cold_s={"plan": 0.1, "prepare": 0.2, "first": 0.3},
    samples=(
        Sample(0, True, (0.1, 0.3, 0.2), 1, {"wire": 0.25}, 0.05, 100, 0),
        Sample(1, False, (0.1, 0.2, 0.3), 2, {"wire": 0.25, "pack": 0.01}, 0.04, 100, 7),
    ),
    summary=summarise([0.3]),
    stability=stability([0.3] * 6),
    bottleneck_gb_per_s=48.1,
    share_of_lower_bound=0.5,
    wrong=(WrongWeights(1, 2, "decoder.weight", 7, (4, 0, 1), 0.25, -0.5),),
    staging_bytes_per_rank=(1, 2, 3),
    extra_memory_bytes_per_rank=(4, None, 6),
    forward=ForwardCheck(True, None, 0.75, 0.125, 25.5, 0.05),
    trained=ForwardCheck(False, None, 0.5, 0.25, 12.5),
    profile=((), (Activity(7, "kernel", 3, 0.1, 0.0, 0.2),)),
)

REFIT = RefitResult(
    quantised=QuantisedRefit(
        "mxfp8", "1x32", "ceil", "Megatron-Core", ("router",), 3, 4, 50, 6, {"33-column shards of 32-column blocks": 1}
    ),
    status=Status.WRONG_DATA,
    model=ModelFacts(1000, 10, ("bfloat16", "float32")),
    plan=Cost(
        payload_bytes=300,
        wire_bytes=200,
        local_bytes=100,
        num_transfers=12,
        sent_by_rank={0: 200},
        received_by_rank={1: 150, 2: 50},
        local_by_rank={1: 100, 2: 0},
        source_weights_by_rank={0: 400},
        destination_weights_by_rank={1: 250, 2: 50},
        digest="0123456789abcdef",
        casts={"router.weight": ("float32", "bfloat16")},
    ),
    bound=Bound("mine", 0.15, "rank 0 sends 200 bytes within its node at 391 GB/s"),
    start_s={"imports": 3.0, "first refit": 0.25},
    engines={"refit": ENGINE, "megatron": EngineResult(Status.WAIVED, "no")},
    rearranged=RefitResult(status=Status.OK, engines={"refit": EngineResult(Status.OK)}),
)
PLACED = VllmOptions(2, 3, 4, ExpertPlacement("a.json", ((0, 1), (1, 0))), ExpertPlacement("round_robin"))

FULL = Result(
    run_id="run",
    status=Status.WRONG_DATA,
    exit_code=1,
    failure=Failure("out of memory", 3, "plan"),
    started="2026-01-26T15:30:00+00:00",
    finished="2026-01-26T15:31:00+00:00",
    world_size=4,
    device="cuda",
    scenario=Scenario(
        model=replace(MODEL, mla=LatentAttention(None, 512, 128, 64, 128)),
        source=SideSpec(Layout(1, 1, 1, 1, 1, 0)),
        destination=SideSpec(
            Layout(1, 2, 1, 1, 2, 1, 3, 4),
            dtype=Dtype.FP32,
            transformer_impl="transformer_engine",
            fsdp2=Fsdp2Options(2),
            vllm=PLACED,
        ),
        mode=Mode.NON_COLLOCATED,
        method="nccl",
        engines=("refit", "megatron"),
        measurements=("refit", "later"),
        num_warmup=1,
        num_iterations=3,
        max_iterations=200,
        verify=Verify.SAMPLE,
        check_forward=True,
        profile=True,
        staging_bytes=1 << 20,
        timeout_s=30.5,
        model_name="kimi_k2",
        model_provider="a:b",
        output_dir=Path("some where/results"),
        recorded={"seq-length": 128, "data-path": ["a", "b"], "swiglu": True, "lr": 0.5, "nothing": None},
        notes=("a choice",),
        device="cuda",
        one_sided_buffers="symmetric",
        nvshmem_force_put=True,
        cluster=Cluster("mine", 391e9, None, 8, None, 80 * 10**9, "H200", "measured"),
        run_name="run",
        steps=StepSettings(
            2, 16, 64, recompute=Recompute("selective", modules=("moe", "mlp")), dispatch=Dispatch("flex", "deepep")
        ),
    ),
    environment=Environment(
        command="benchmark_refit.py --model tiny",
        versions={"torch": "2.11.0"},
        commit="e660a99",
        host="node1",
        cpu="a CPU",
        num_cpus=8,
        memory_bytes=1 << 34,
        gpus=(Gpu("NVIDIA H200", 150 * 10**9), Gpu("NVIDIA H200")),
        variables={"NCCL_NVLS_ENABLE": "0"},
    ),
    measurements={"refit": REFIT},
)
"""A result in which no field that has a default has it."""


def written(value: Result, tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    ResultFile(path).write(value)
    return path


def edited(tmp_path: Path, *place: str | int, value: Any = ...) -> Path:
    """The file of a full result in which `place` has another value, or is missing."""
    path = written(FULL, tmp_path)
    content = json.loads(path.read_text())
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path.write_text(json.dumps(content))
    return path


def error(path: Path) -> str:
    """The message of the one UsageError that reading `path` raises. It names the file and is one line."""
    with pytest.raises(UsageError) as caught:
        read_result(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message


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


@pytest.mark.parametrize("version", [1, 2])
def test_the_report_of_an_older_result_has_the_figures_it_had(version: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(GOLDEN / f"result_{version}.json"), "--format", "csv"]) == 0
    check_same_figures(GOLDEN / f"result_{version}.csv", capsys.readouterr().out)


def test_a_result_of_version_2_has_everything_in_its_new_place() -> None:
    run = read_result(GOLDEN / "result_2.json")
    assert (run.schema_version, run.status, run.exit_code, run.world_size, run.device) == (3, Status.OK, 0, 3, "cpu")
    scenario, refit = run.scenario, run.refit
    assert scenario is not None
    assert scenario.model is not None
    assert scenario.model.experts is not None
    assert scenario.source == SideSpec(Layout(1, 1, 1, 1, 1))
    assert scenario.destination == SideSpec(Layout(1, 2, 1, 1, 2, first_rank=1))
    assert (scenario.engines, scenario.measurements, scenario.method) == (("refit", "megatron"), ("refit",), "gloo")
    assert (scenario.num_warmup, scenario.num_iterations, scenario.check_forward) == (1, 2, True)
    assert (scenario.one_sided_buffers, scenario.model_name, scenario.recorded) == ("ring", "tiny", {"seq-length": 128})
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

    def fail(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(runner, "build_side", fail)
    assert FULL.scenario is not None
    assert FULL.environment is not None
    file = ResultFile.create(tmp_path, "run")
    session = Session(FULL.scenario, 0, 4, torch.device("cpu"), None, FULL.environment)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        runner.benchmark(session, file)
    file.mark_failed(4, Failure("too large", 0, "build"))
    found = read_result(file.path)
    assert (found.status, found.scenario, found.environment) == (Status.FAILED, FULL.scenario, FULL.environment)


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
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"run_id": "run"', "Expecting ',' delimiter"),
        ("[" * 100_000, "recursion"),
        ("null", "it holds no result"),
        (" \n", "it holds no result"),
        ('{"a":' * 80 + "1" + "}" * 80, "it is nested more than 50 deep"),
        (f'{{"run_id": "run", "world_size": {10**400}}}', "a number beyond 10^20 - at `$.world_size`"),
        ('{"run_id": "run", "world_size": 1e999}', "a number that is not finite - at `$.world_size`"),
        ('{"run_id": "run", "device": NaN}', "a number that is not finite - at `$.device`"),
        (f'{{"run_id": "{"x" * 300_000}"}}', "text of 300,000 characters, more than 200,000 - at `$.run_id`"),
        ('{"run_id": "run", "schema_version": 99}', "schema version 99 is not one of 1 to 3"),
        ("[]", "it holds no result"),
        ('{"a": 1}', "it holds no result"),
        ('{"run_id": "run", "scenarios": []}', "it holds no result"),
        ('{"run_id": "run", "schema_version": 4}', "schema version 4 is not one of 1 to 3"),
        ('{"run_id": "run", "schema_version": "x"}', "schema version 'x' is not one of 1 to 3"),
        ('{"run_id": "run", "schema_version": null}', "schema version None is not one of 1 to 3"),
    ],
)
def test_what_is_no_result_file(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    message = error(path)
    assert " is no result file of this benchmark (" in message
    assert reason in message
    assert message.endswith("): move it away, or give the result files' own folder")


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "can't decode byte" in error(path)
    assert "cannot be read: No such file or directory" in error(tmp_path / "none.json")


ENGINES = ("measurements", "refit", "engines")


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("run_id",), 5, "Expected `str`, got `int` - at `$.run_id`"),
        (("status",), "odd", "Invalid enum value 'odd' - at `$.status`"),
        (("failure", "message"), ..., "Object missing required field `message` - at `$.failure`"),
        (("scenario", "mode"), ..., "Object missing required field `mode` - at `$.scenario`"),
        (("scenario", "source", "layout", "tp"), "2", "Expected `int`, got `str` - at `$.scenario.source.layout.tp`"),
        (("scenario", "source", "layout", "tp"), 0, "tp must be at least 1, got 0"),
        (("environment", "gpus", 1), "H200", "Expected `object`, got `str` - at `$.environment.gpus[1]`"),
        (("measurements",), [], "Expected `object`, got `array` - at `$.measurements`"),
        (("measurements", "refit"), None, "measurement refit: Expected `object`, got `null`"),
        (("measurements", "refit", "plan", "digest"), ..., "measurement refit: Object missing required field `digest`"),
        (
            (*ENGINES, "refit", "samples", 1, "num_wrong"),
            None,
            "Expected `int`, got `null` - at `$.engines[...].samples[1]",
        ),
        ((*ENGINES, "refit", "samples", 0, "seconds_per_rank"), [], "samples[0].seconds_per_rank is empty"),
        ((*ENGINES, "refit", "samples", 0, "seconds_per_rank", 1), -1, "samples[0].seconds_per_rank is negative"),
        ((*ENGINES, "refit", "samples", 0, "slowest_rank"), 3, "samples[0].slowest_rank 3 is not one of its ranks"),
        ((*ENGINES, "refit", "samples"), [], "engines.refit has a summary without measured refits"),
        ((*ENGINES, "refit", "summary", "min_s"), 9, "min_s, median_s and max_s must be above 0 and in this order"),
        (("measurements", "refit", "plan", "sent_by_rank"), {}, "plan.sent_by_rank has no ranks"),
        (("measurements", "refit", "plan", "sent_by_rank", "0"), -1, "plan.sent_by_rank is negative"),
        (("measurements", "refit", "plan", "local_by_rank", "10000000"), 1, "10000000 is not a rank from 0 to"),
        (("measurements", "refit", "bound", "seconds"), -1, "bound.seconds is negative"),
        (("scenario", "source", "layout", "first_rank"), -1, "first_rank must be at least 0, got -1"),
        (("scenario", "output_dir"), 5, "Expected a path, got int"),
        ((*ENGINES, "refit", "summary"), {}, "Object missing required field `mean_s` - at `$.engines[...].summary`"),
    ],
)
def test_a_damaged_field_is_named(place: tuple[str | int, ...], value: object, reason: str, tmp_path: Path) -> None:
    assert reason in error(edited(tmp_path, *place, value=value))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("bound",), {"cluster": "mine"}, "(schema version 2: field 'lower_bound_s' is missing)"),
        (("bytes",), {"payload": 1}, "(schema version 2: field 'wire' is missing)"),
        (("bytes", "sent_by_rank"), ..., "(schema version 2: field 'sent_by_rank' is missing)"),
        (("scenario",), "tiny", "(schema version 2: 'str' object has no attribute"),
        (("layouts",), ["source", "destination"], "(schema version 2: "),
        (("engines",), {"refit": 5}, "(schema version 2: "),
        (("failure",), "killed", "(schema version 2: "),
        (("scenario", "mode"), ..., "Object missing required field `mode` - at `$.scenario`"),
        (("engines", "refit", "samples", 0, "warmup"), 1, "Expected `bool`, got `int` - at `$.engines[...].samples[0]"),
    ],
)
def test_a_damaged_field_of_an_older_result_is_named(
    place: tuple[str | int, ...], value: object, reason: str, tmp_path: Path
) -> None:
    content = json.loads((GOLDEN / "result_2.json").read_text())
    holder: Any = content
    for step in place[:-1]:
        holder = holder[step]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    assert reason in error(path)


def test_a_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(tmp_path, "scenario", "mode")
    assert main(["report", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path} is no result file of this benchmark (Object missing required")
    assert captured.err.count("\n") == 1


def test_upgrading_leaves_what_was_given_as_it_is() -> None:
    content = json.loads((GOLDEN / "result_2.json").read_text())
    content["failure"] = {"rank": 1}
    before = json.dumps(content)
    run = decoded_result(content)
    assert json.dumps(content) == before
    assert run.failure == Failure("", 1)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], Status.OK),
        ([Status.OK, Status.OK], Status.OK),
        ([Status.OK, Status.WAIVED], Status.WAIVED),
        ([Status.WAIVED, Status.RUNNING], Status.RUNNING),
        ([Status.RUNNING, Status.FAILED], Status.FAILED),
        ([Status.FAILED, Status.WRONG_DATA, Status.OK], Status.WRONG_DATA),
    ],
)
def test_the_worst_part_decides(statuses: list[Status], expected: Status) -> None:
    assert worst(statuses) is expected
    assert worst(statuses[::-1]) is expected


def test_every_status_has_an_exit_code_a_text_and_an_end() -> None:
    codes = {Status.OK: ExitCode.OK, Status.WRONG_DATA: ExitCode.WRONG_DATA, Status.WAIVED: ExitCode.WAIVED}
    assert {status: status.exit_code for status in Status} == dict.fromkeys(Status, ExitCode.FAILED) | codes
    ended = {status for status in Status if status.has_ended}
    assert ended == {Status.OK, Status.WRONG_DATA, Status.WAIVED, Status.FAILED}
    assert set(COUNTED) == set(Status) - {Status.READY, Status.RUNNING}
    assert Status.WRONG_DATA.text == "wrong data"


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), None),
        (("megatron",), "megatron"),
        (("megatron", "refit"), "refit"),
        (("refit", "megatron"), "refit"),
        (("megatron", "removed"), "removed"),
    ],
)
def test_which_engine_is_judged(names: tuple[str, ...], expected: str | None) -> None:
    assert judged_engine(names) == expected
    engines = {name: EngineResult(reason=name) for name in names}
    found = RefitResult(engines=engines)
    assert found.tested == (engines[expected] if expected else None)
    assert list(found.baselines) == [name for name in names if name != expected]


def test_the_times_of_an_engine() -> None:
    assert (ENGINE.warmup_s, ENGINE.measured_s) == ([0.3], [0.3])
    assert (ENGINE.num_compared, ENGINE.num_wrong) == (200, 7)
    assert ENGINE.cold_total_s == pytest.approx(0.6)
    assert (ENGINE.median_s, EngineResult().median_s) == (0.3, None)


def test_a_result_of_the_factories_comes_back_too(tmp_path: Path) -> None:
    run = result(planned("run"), bound_s=0.04)
    assert read_result(written(run, tmp_path)) == run
