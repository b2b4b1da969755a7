"""Collections: what they keep, what they leave out, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from refit.results.collection import portable, read_collection, write_collection
from refit.results.reading import UnreadableFile
from refit.results.result import Result
from refit.results.runs import find_run
from tests.report.factories import ENVIRONMENT, planned, result


def results() -> list[Result]:
    command = "benchmark_refit.py --model tiny --output-dir '/home/some one/x' --refit-method gloo"
    variables = {**ENVIRONMENT.variables, "NVSHMEM_HOME": "/opt/nvshmem"}
    environment = replace(ENVIRONMENT, command=command, variables=variables)
    first, second = planned("b"), planned("a")
    return [
        result(first, environment=environment, started="2026-01-26T15:30:00+00:00"),
        result(second, environment=environment, started="2026-01-26T15:31:00+00:00"),
    ]


def test_results_come_back_without_what_belongs_to_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    write_collection(path, results())
    found, text = read_collection(path), path.read_text()
    assert [one.scenario for one in found] == [portable(one).scenario for one in results()]
    assert found[0].refit is not None
    assert found[0].refit.tested is not None
    assert found[0].refit.tested.measured_s == [0.0449, 0.0452, 0.0456]
    write_collection(path, found)
    assert path.read_text() == text
    assert len(text.splitlines()) == 2
    assert not [word for word in ("node001", "/home", "/opt", "output-dir", "9876543") if word in text]
    environment = read_collection(path)[0].environment
    assert environment is not None
    assert environment.command == "benchmark_refit.py --model tiny --refit-method gloo"


def test_a_collection_is_a_run(tmp_path: Path) -> None:
    write_collection(tmp_path / "part.jsonl", results())
    run = find_run(tmp_path / "part.jsonl")
    assert run.sweep.run_id == "part"
    assert [outcome.planned.name for outcome in run.outcomes] == ["b", "a"]
    assert not run.is_sweep


def line(**changes: object) -> str:
    return json.dumps({"run_id": "a", "schema_version": 3, "status": "failed", **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("[]", "line 1"),
        (line() + "\n{", "line 2"),
        (line() + "\n" + line(), "several results are called a"),
        (line(run_id="../../a"), "cannot be part of a file name"),
        (line(schema_version=99), "line 1"),
        (line(world_size=10**30), "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_what_is_no_collection_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text(text)
    with pytest.raises(UnreadableFile, match=reason) as caught:
        find_run(path)
    assert "part.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
