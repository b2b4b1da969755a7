"""What can be checked of a command that a document names, without ranks, GPUs or Slurm: how far its line goes."""

from __future__ import annotations

import argparse
import ast
import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from refit import commands
from refit.checkpoints import write
from refit.checkpoints.layout import plan_folder
from refit.cli import parsing as cli
from refit.cli.flags import full_parser
from refit.cli.main import main
from refit.config.scenario import check_num_ranks
from refit.config.shape import Dtype
from refit.predict.families.config_json import config_values
from refit.predict.sides import predict_side
from refit.sweep.selection import select_file
from tests.documents import ROOT, Command

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OPEN_FILES = ("benchmark_refit_kimi_k2.sh", "test_nvshmem_refit.sh")
"""Scripts whose options are those that their --help names."""

ALLOCATION_OPTIONS = ("--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--time", "--exclude")
"""Options of sbatch, salloc and srun that the documents use (their manuals)."""


def check_for(command: Command) -> Callable[[list[str]], None]:
    """What can be checked of a command, given the words after the program."""
    if command.program.endswith(".sh"):
        return lambda words: check_script(command.words[0], words)
    return CHECKS[command.program]


def check_python(words: list[str]) -> None:
    if words[0] == "-m" and words[1] == "refit":
        check_refit(words[2:])
    elif words[0] == "-m" and words[1].startswith("benchmarks."):
        check_benchmark(words[1], words[2:])
    elif words[0] == "-m":
        assert words[1] in ("venv", "pip")
    elif words[0] == "-c":
        check_imports(ast.parse(words[1]))
    else:
        assert words[0] == "benchmark_refit.py"
        assert "--dry-run" in words, "without it torchrun has to start ranks"
        assert main(words[1:]) == 0


def check_imports(tree: ast.AST) -> None:
    """That what a line imports from this project is there; to import it would load torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = ROOT / f"{(node.module or '').replace('.', '/')}.py"
            defined = {each.name for each in ast.parse(source.read_text()).body if isinstance(each, ast.FunctionDef)}
            assert {alias.name for alias in node.names} <= defined


def check_torchrun(words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--nproc-per-node", "--nnodes", "--master-port"):
        parser.add_argument(option, type=int, default=1)
    script = words.index("benchmark_refit.py")
    launch = parser.parse_args(words[:script])
    request = cli.parse(words[script + 1 :])
    assert request.dry_run is None
    check_num_ranks(request.scenario, launch.nnodes * launch.nproc_per_node)


def check_refit(words: list[str]) -> None:
    if words[0] in ("bounds", "place") and "--into" not in words:
        assert commands.main(words) == 0
        return
    if words[0] == "run":
        cli.parse(readable(words[1:]))
        return
    end = words.index("--") if "--" in words else len(words)
    commands.command_parser().parse_args(words[:end])
    full_parser().parse_flags(words[end + 1 :])


def check_benchmark(module: str, words: list[str]) -> None:
    known = benchmark_flags(ROOT / f"{module.replace('.', '/')}.py")
    end = words.index("--") if "--" in words else len(words)
    assert {word.split("=")[0] for word in words[:end] if word.startswith("--")} <= known
    full_parser().parse_flags(words[end + 1 :])
    if "--list" in known:
        done = subprocess.run(
            [sys.executable, "-m", module, *words[:end], "--list"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "nothing would run"


def benchmark_flags(path: Path) -> set[str]:
    """The options that a module adds to its parser, read from its source: loading some of them loads torch."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = (node for node in nodes if isinstance(node, ast.Call))
    adding = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument")
    found = {word.value for call in adding for word in call.args if isinstance(word, ast.Constant)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and "add_arguments" in {alias.name for alias in node.names}:
            found |= benchmark_flags(ROOT / f"{(node.module or '').replace('.', '/')}.py")
    return found


def check_make(words: list[str]) -> None:
    for word in words:
        variable, equals, _ = word.partition("=")
        rule = rf"^(export )?{variable} \?=" if equals else rf"^{word}:"
        assert re.search(rule, MAKEFILE, re.MULTILINE), f"the Makefile has no {word}"


def check_pip(words: list[str]) -> None:
    extras = {extra for word in words for found in re.findall(r"\[([\w,]+)\]$", word) for extra in found.split(",")}
    table = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    assert extras <= set(re.findall(r"^(\w+) =", table, re.MULTILINE))


def check_submission(words: list[str]) -> None:
    """sbatch, salloc and srun: their own options, then perhaps a command."""
    start = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    assert {word.split("=")[0] for word in words[:start]} <= set(ALLOCATION_OPTIONS)
    if start == len(words):
        return
    if words[start] in CHECKS:
        CHECKS[words[start]](words[start + 1 :])
    else:
        check_script(words[start], words[start + 1 :])


def check_script(name: str, words: list[str]) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK), f"{name} cannot be executed"
    end = words.index("--") if "--" in words else len(words)
    options, flags = words[:end], words[end + 1 :]
    if path.name not in OPEN_FILES:
        assert (main(words) if "--dry-run" in words else commands.main(["place", "--", *words])) == 0
        return
    own = {word for word in options if word.startswith("--") and word in help_text(path)}
    rest = [word for word in options if word not in own]
    if path.name == "test_nvshmem_refit.sh":
        flags = [*rest, *flags]
    else:
        assert not [word for word in rest if word.startswith("-")], f"{name} --help does not name these"
    full_parser().parse_flags(flags)
    if "--scenarios" in options:
        check_scenarios(options[options.index("--scenarios") + 1])


def check_scenarios(name: str) -> None:
    if not name.endswith(".yaml"):  # a list of the reader's own
        select_file(name, [])


@cache
def help_text(script: Path) -> str:
    return subprocess.run([script, "--help"], capture_output=True, text=True, check=True, timeout=100).stdout


CHECKS: Mapping[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
    "refit": check_refit,
    "make": check_make,
    "pip": check_pip,
    "sbatch": check_submission,
    "salloc": check_submission,
    "srun": check_submission,
}


def readable(words: Sequence[str]) -> list[str]:
    """`words` with a checkpoint that is there in place of the one that they read."""
    return [
        a_checkpoint() if before == "--source-weights" else word
        for before, word in zip(("", *words[:-1]), words, strict=True)
    ]


@cache
def a_checkpoint() -> str:
    """A folder with the headers of tiny_qwen3_moe, and zeros."""
    side = cli.parse(["--model=tiny_qwen3_moe", "--dry-run"]).scenario
    assert side.model is not None
    folder = Path(tempfile.mkdtemp()) / "made"
    held = predict_side(side.model, side.source).tensors
    planned, _ = plan_folder(folder, side.model, Dtype.BF16, held)
    write.create(planned, config_values(side.model), [])
    write.finish(planned)
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    return str(folder)
