"""A run that died before its result held the layouts shows those of its command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from refit.commands import main
from refit.results.result import Environment, Failure, Result, encoded
from refit.results.status import Status
from tests.report.factories import planned
from tests.report.factories import result as result_of

COMMAND = "benchmark_refit.py --model tiny --tensor-model-parallel-size 4 --refit-method shm"
DIED = Result("early", status=Status.FAILED, exit_code=4, failure=Failure("killed by signal 9", 3, "plan"))


def reported(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> str:
    died = replace(DIED, environment=Environment(command=command))
    (tmp_path / "early.json").write_text(encoded(died))
    assert main(["report", str(tmp_path)]) == 0
    return capsys.readouterr().out


def test_the_layouts_of_the_command_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = reported(capsys, tmp_path, COMMAND)
    assert "TP=4" in text
    assert "ended before it recorded" not in text
    assert "shm" in text


@pytest.mark.parametrize("command", ["", "benchmark_refit.py --unheard-of", "benchmark_refit.py --model 'x"])
def test_a_command_that_is_refused_here_leaves_them_unknown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    assert "ended before it recorded" in reported(capsys, tmp_path, command)


def test_a_result_with_its_scenario_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(encoded(result_of(planned("one"))))
    assert main(["report", str(tmp_path)]) == 0
    assert "TP=4" not in capsys.readouterr().out
