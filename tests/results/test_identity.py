"""Results are compared with the scenario they are meant to be of, field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.results.identity import differences, foreign
from refit.results.result import Result, converted, encoded
from refit.results.status import Status
from tests.report.factories import planned

FLAGS = ["--model", "tiny", "--refit-method", "nccl", "--tensor-model-parallel-size", "2"]


def scenario(*flags: str) -> Scenario:
    return parse([*FLAGS, "--dry-run", *flags]).scenario


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--output-dir=elsewhere", "--run-name=a", "--cluster=h200_nvlink"], []),
        (["--refit-method=gloo"], []),  # what stands in for nccl on CPUs
        (["--refit-method=shm"], ["method shm, planned nccl"]),
        (["--vocab-size=1024"], ["model.vocab_size 1024, planned"]),
        (["--num-benchmark-iterations=9"], ["num_iterations 9, planned 5"]),
        (["--verify=off"], ["verify off, planned full"]),
        (["--refit-mode=collocated"], ["destination.layout.first_rank 0, planned 2", "mode collocated, planned"]),
    ],
)
def test_what_differs_is_named(flags: list[str], expected: list[str]) -> None:
    found = differences(scenario(), scenario(*flags))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(sorted(found), sorted(expected), strict=True)), found


def test_what_auto_chose_is_the_scenario_that_was_planned() -> None:
    planned = scenario("--refit-method=auto")
    ran = replace(scenario("--refit-method=shm"), device="cpu")
    assert differences(planned, ran) == []
    assert differences(planned, replace(ran, num_warmup=7)) == ["num_warmup 7, planned 2"]
    assert differences(replace(planned, device="cuda"), ran) == ["device cpu, planned cuda"]


def test_a_scenario_from_a_file_is_the_same() -> None:
    ran = converted(json.loads(encoded(scenario("--output-dir=a"))), Scenario)
    assert ran.output_dir == Path("a")
    assert differences(scenario(), ran) == []


def test_only_a_run_that_ended_early_may_lack_its_scenario() -> None:
    entry = replace(planned("a"), scenario=scenario())
    assert foreign(entry, Result("a", status=Status.FAILED)) is None
    assert "it does not say which" in (foreign(entry, Result("a", status=Status.OK)) or "")
    assert foreign(planned("a"), Result("a", status=Status.OK)) is None, "a sweep of an older version"
    many = scenario("--hidden-size=128", "--vocab-size=1024", "--num-layers=1", "--moe-layer-freq=1", "--verify=off")
    assert " more" in (foreign(entry, Result("a", status=Status.OK, scenario=many)) or "")
