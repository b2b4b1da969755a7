"""What documents and the help name is planned, and where that takes seconds on a CPU also run, for real."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from refit import commands
from refit.results.collection import read_collection
from refit.results.result import encoded
from tests import documents
from tests.command_checks import check_refit, readable
from tests.commands.test_help import EVERY
from tests.documents import ROOT, Command

COMMANDS = [command for path in documents.markdown_files() for command in documents.commands(path)]
SWEEP_PLANS = sorted({c.words[c.words.index("sweep") :] for c in COMMANDS if {"sweep", "plan"} <= {*c.words}})


@pytest.mark.slow
@pytest.mark.parametrize("words", SWEEP_PLANS, ids=" ".join)
def test_a_sweep_can_be_planned(words: tuple[str, ...]) -> None:
    assert commands.main(list(words)) == 0


@pytest.mark.parametrize("program", [["benchmark_refit.py", "--dry-run"], ["-m", "refit", "run", "--dry-run"]])
def test_a_python_without_packages_is_told_which_to_call(program: list[str]) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", *program, "--model", "tiny"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: \S+ has no \w+: call .venv/bin/python", line)


def is_slow(words: Sequence[str]) -> bool:
    """Whether a plan of it takes a second or more: the models of real size."""
    return any(name in words for name in ("kimi_k2", "deepseek_v3", "qwen3_30b_a3b", "ep64_tp2"))


def runs() -> Iterator[tuple[str, ...]]:
    """The flags of every command that starts ranks."""
    for command in COMMANDS:
        if command.program == "torchrun":
            yield command.words[command.words.index("benchmark_refit.py") + 1 :]
        elif command.program == "refit" and command.words[1] == "run":
            yield command.words[2:]
        elif command.words[1:4] == ("-m", "refit", "run"):
            yield command.words[4:]


@pytest.mark.parametrize(
    "words",
    [pytest.param(each, marks=pytest.mark.slow) if is_slow(each) else each for each in dict.fromkeys(runs())],
    ids=" ".join,
)
def test_a_run_can_be_planned(words: tuple[str, ...]) -> None:
    if "--model-provider" not in words and "--list" not in words:
        assert commands.main(["run", *readable(words), "--dry-run"]) == 0


EXAMPLES = sorted(
    {
        tuple(shlex.split(line.partition(" > ")[0]))
        for parser in EVERY.values()
        for line in (parser.epilog or "").splitlines()
        if line.startswith("  refit ")
    }
)


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_an_example_of_the_help_works(words: tuple[str, ...]) -> None:
    if "--list" in words:
        return
    check_refit(list(words[1:]))
    if words[1] == "run" and not is_slow(words):
        assert commands.main([*words[1:], "--dry-run"]) == 0


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 8


PROGRAMS = {"python": "", "torchrun": "-m torch.distributed.run", "refit": "-m refit"}


def as_typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a line does in a checkout, from a shell that has nothing of this environment on its PATH."""
    (folder / ".venv/bin").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in (".venv", "benchmark_results"):
            (folder / path.name).symlink_to(path)
    for name, arguments in PROGRAMS.items():
        program = folder / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made_before(folder / "benchmark_results")
    return subprocess.run(
        ["/bin/sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )


def made_before(folder: Path) -> None:
    """What earlier commands of a document have put there: shipped results of other machines stand for it."""
    for name in ("tiny", "before", "after"):
        logs = folder / name / "logs"
        logs.mkdir(parents=True)
        for each in read_collection(ROOT / "docs/results/older/gpu2_fp8.jsonl")[:3]:
            (logs / f"{each.run_id}.json").write_text(encoded(each), encoding="utf-8")


EVALUATIONS = [c for c in COMMANDS if {"refit", "report"} <= {*c.words} or {"compare", "plot"} & {*c.words[:4]}]


@pytest.mark.slow
@pytest.mark.parametrize("command", EVALUATIONS, ids=lambda command: f"{command.place} {' '.join(command.words[3:])}")
def test_an_evaluation_does_what_is_printed(command: Command, tmp_path: Path) -> None:
    done = as_typed(command.line, tmp_path)
    assert done.returncode == 0, done.stderr
    _, redirected, name = command.line.partition(" > ")
    assert (tmp_path / name.strip()).read_text(encoding="utf-8") if redirected else done.stdout
    pictures = [line for line in done.stdout.splitlines() if line.endswith(".png")]
    assert len(pictures) > 2 or "plot" not in command.words
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in pictures)


def test_there_are_evaluations() -> None:
    assert {command.words[3] for command in EVALUATIONS} == {"report", "compare", "plot"}
    assert len(EVALUATIONS) > 8


SMALL_RUNS = [c for c in COMMANDS if c.program == "torchrun" and c.place.startswith(("README", "quickstart"))]


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALL_RUNS, ids=lambda command: command.place)
def test_a_small_run_does_what_is_printed(command: Command, tmp_path: Path) -> None:
    done = as_typed(command.line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PASSED (refit)" in done.stdout
    if "both" in command.words:
        assert re.search(r"^ *Ratio: refit is \d", done.stdout, re.MULTILINE), "the text promises a ratio"
