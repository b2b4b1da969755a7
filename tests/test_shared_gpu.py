"""Random layouts on one GPU, as far as a machine without GPUs can check them: what is drawn, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import random_layouts as drawn
from benchmarks.random_layouts import Layouts, coverage, random_layouts
from benchmarks.shared_gpu import failed, flags_of, is_right, row, run_all
from refit.cli.parsing import parse
from refit.config.scenario import Mode
from refit.results.collection import read_collection, write_collection
from refit.results.status import Status
from refit.results.sweep import check_name
from tests.report.factories import planned, result, timed


def broken_model(*_: object) -> None:
    raise ValueError("no such model")


BROKEN = Layouts("broken", ("--model-provider=tests.test_shared_gpu:broken_model",))
WORKS = ("--model=tiny_qwen3_moe", "--num-layers=1", "--rl-inference-tensor-model-parallel-size=2")


def test_layouts_are_random_by_their_seed_alone() -> None:
    assert random_layouts(6, 8, 1) == random_layouts(6, 8, 1)
    assert random_layouts(6, 8, 1) != random_layouts(6, 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("has_deepspeed", [True, False])
def test_sixty_layouts_have_something_of_everything(monkeypatch: pytest.MonkeyPatch, has_deepspeed: bool) -> None:
    here = {"transformers", "deepspeed"} if has_deepspeed else {"transformers"}
    monkeypatch.setattr(drawn, "find_spec", lambda library: library if library in here else None)
    listed = random_layouts(64, 8, 1)
    assert len({each.name for each in listed}) == len({each.flags for each in listed}) == 64
    scenarios = [parse(flags_of(each, "cuda", 8)).scenario for each in listed]
    assert max(one.num_ranks for one in scenarios) == 8
    assert all((one.method, one.ranks_per_gpu) == ("cuda-ipc", 8) for one in scenarios)
    assert {one.mode for one in scenarios} == set(Mode)
    formats = {"megatron", "fsdp2", *(["autotp"] if has_deepspeed else [])}
    assert {one.source.format for one in scenarios} == formats
    assert {one.destination.format for one in scenarios} == {*formats, "vllm"}
    text = coverage(scenarios)
    for what in ("fp8-block", "mxfp8", "bf16", "another PP", "another ETP", "another EP", "HSDP", "several engines"):
        assert f"{what} " in text
        assert f"{what} 0" not in text
    for each in listed:
        check_name(each.name, "name")


def test_few_ranks_have_few_layouts() -> None:
    assert all(parse(flags_of(each, "cpu", 2)).scenario.num_ranks <= 2 for each in random_layouts(8, 2, 3))


def test_the_rank_that_failed_first_is_named_with_what_the_others_say(tmp_path: Path) -> None:
    scenario = parse([*WORKS, "--refit-method=shm"]).scenario
    (tmp_path / "broken.rank0.err").write_text("20.5\nmove\nTraceback\nConnectionError: closed\n")
    (tmp_path / "broken.rank2.err").write_text("20.1\nbuild\nTraceback\n  a line\nValueError: no\n")
    found, told = failed(tmp_path, BROKEN, scenario, tmp_path / "log", 3)
    assert found.failure is not None
    assert (found.status, found.failure.message, found.failure.rank) == (Status.FAILED, "ValueError: no", 2)
    assert row(found).endswith("FAILED on rank 2 in phase 'build': ValueError: no")
    assert "rank 2 failed first, in phase 'build':\n     Traceback\n       a line" in told
    assert "rank 0 in phase 'move': ConnectionError: closed" in told
    assert "rank 1 said nothing" in told
    assert not is_right(found)


def test_processes_that_leave_nothing_are_told_by_their_log(tmp_path: Path) -> None:
    log = tmp_path / "ranks.log"
    log.write_text("exitcode: -9\n")
    found, told = failed(tmp_path, BROKEN, parse([*WORKS, "--refit-method=shm"]).scenario, log, 3)
    assert found.failure is not None
    assert found.failure.message == "its processes ended without a word: see ranks.log"
    assert told == "     exitcode: -9"


def test_only_what_was_compared_and_equal_is_right() -> None:
    assert is_right(result(planned("a"), engines={"refit": timed([0.1])}))
    wrong = result(planned("a"), engines={"refit": timed([0.1], num_wrong=3)})
    assert not is_right(wrong)
    assert "6 wrong  WRONG" in row(wrong)


@pytest.mark.slow
def test_a_layout_that_fails_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed = [Layouts("first", WORKS), BROKEN, Layouts("last", (*WORKS, "--refit-mode=collocated"))]
    results = run_all(listed, tmp_path, "cpu", 3, 120.0)
    assert [(each.run_id, each.status) for each in results] == [
        ("first", Status.OK),
        ("broken", Status.FAILED),
        ("last", Status.OK),
    ]
    assert [is_right(each) for each in results] == [True, False, True]
    output = capfd.readouterr().out
    assert "in phase 'build source model'" in output
    assert "no such model" in output
    write_collection(tmp_path / "all.jsonl", results)
    assert [each.run_id for each in read_collection(tmp_path / "all.jsonl")] == ["first", "broken", "last"]
