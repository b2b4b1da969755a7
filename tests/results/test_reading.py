"""What is no result file, or a damaged one, is one error that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refit.commands import main
from tests.results.full import FULL, GOLDEN, error, written

ENGINES = ("measurements", "refit", "engines")


def edited(tmp_path: Path, original: Path, *place: str | int, value: Any = ...) -> Path:
    """A copy of a result file in which `place` has another value, or is missing."""
    content = json.loads(original.read_text())
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(content))
    return path


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
        ('{"run_id": "run", "schema_version": 99}', "schema version 99 is not one of 1 to 4"),
        ("[]", "it holds no result"),
        ('{"a": 1}', "it holds no result"),
        ('{"run_id": "run", "scenarios": []}', "it holds no result"),
        ('{"run_id": "run", "schema_version": 5}', "schema version 5 is not one of 1 to 4"),
        ('{"run_id": "run", "schema_version": "x"}', "schema version 'x' is not one of 1 to 4"),
        ('{"run_id": "run", "schema_version": null}', "schema version None is not one of 1 to 4"),
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
    assert reason in error(edited(tmp_path, written(FULL, tmp_path), *place, value=value))


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
    assert reason in error(edited(tmp_path, GOLDEN / "result_2.json", *place, value=value))


def test_a_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(tmp_path, written(FULL, tmp_path), "scenario", "mode")
    assert main(["report", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path} is no result file of this benchmark (Object missing required")
    assert captured.err.count("\n") == 1
