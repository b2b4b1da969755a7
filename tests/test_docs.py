"""The documents are true: their commands work, the messages they quote are printed, their flags and links exist.

Dry runs and plans are made for real. What needs ranks, GPUs or Slurm is taken as far as its command line goes.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from refit import commands
from refit.checkpoints import write
from refit.checkpoints.layout import plan_folder
from refit.cli import parsing as cli
from refit.cli.flags import full_parser
from refit.cli.main import main
from refit.commands.run import own_flags
from refit.config.scenario import check_num_ranks
from refit.config.shape import Dtype
from refit.errors import UsageError
from refit.predict.families.config_json import config_values
from refit.predict.sides import predict_side
from refit.results.collection import read_collection
from refit.results.result import encoded
from refit.sweep.selection import select_file, select_lines
from tests import documents, messages
from tests.commands.test_help import EVERY
from tests.documents import ROOT, Command

DOCUMENTS = documents.markdown_files()
COMMANDS = [command for path in DOCUMENTS for command in documents.commands(path)]
SWEEP_PLANS = sorted({c.words[c.words.index("sweep") :] for c in COMMANDS if {"sweep", "plan"} <= {*c.words}})
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OPEN_FILES = ("benchmark_refit_kimi_k2.sh", "test_nvshmem_refit.sh")
"""Scripts whose options are those that their --help names."""

ALLOCATION_OPTIONS = ("--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--time", "--exclude")
"""Options of sbatch, salloc and srun that the documents use (their manuals)."""

FOREIGN_FLAGS = {
    *ALLOCATION_OPTIONS,
    *("--gpus-per-task", "--nodelist", "--overlap"),  # srun and squeue
    *("--container-image", "--container-mounts", "--container-workdir"),  # srun with pyxis
    *("--nproc-per-node", "--nnodes", "--master-port"),  # torchrun
    *("--shm-size", "--ipc", "--build-arg", "--tag"),  # docker
    *("--editable", "--target", "--no-deps"),  # pip install
}
KNOWN_TO_PYTORCH = re.compile(r"[A-Z]\w*Error: .+")
"""What `FAILED:` lines say of an exception that is not ours: its type and its text."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place} {' '.join(command.words)[:60]}")
def test_a_command_works(command: Command) -> None:
    check_for(command)(list(command.words[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("words", SWEEP_PLANS, ids=" ".join)
def test_a_sweep_can_be_planned(words: tuple[str, ...]) -> None:
    assert commands.main(list(words)) == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_fresh_shell_finds_every_program(path: Path) -> None:
    """`make demo` installs them in `.venv`, which nothing puts on the PATH; some machines have no `python` at all."""
    bare = [c for c in documents.commands(path) if c.program in INSTALLED and not c.words[0].startswith(".venv")]
    assert bare == []


INSTALLED = ("python", "python3", "torchrun", "refit", "pip")


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


def test_every_kind_of_command_is_found() -> None:
    kinds = {command.program for command in COMMANDS}
    assert kinds >= {"python", "torchrun", "make", "pip", "sbatch", "salloc", "test_nvshmem_refit.sh"}
    assert len(COMMANDS) > 30


def test_lines_of_configs_are_scenarios() -> None:
    found = [
        line
        for path in DOCUMENTS
        for _, block in documents.blocks(path.read_text(encoding="utf-8"))
        for line in re.findall(r'^\s+"((?:\d+:){4}\S+)"', "\n".join(block), re.MULTILINE)
    ]
    assert found
    assert len(select_lines(found, ["--model", "kimi_k2"], None).candidates) == len(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in documents.links(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in documents.anchors(file), f"{path.name}: {target}"


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_files_that_are_named_exist(path: Path) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|sh|yaml|md|txt))`", path.read_text(encoding="utf-8")))
    assert [name for name in named if not (ROOT / name).exists() and not (ROOT / "refit" / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_heading_stands_twice(path: Path) -> None:
    """A second one comes of a passage that was pasted twice, and no link can name it."""
    anchors = documents.anchors(path)
    assert sorted(set(anchors)) == sorted(anchors)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(path: Path) -> None:
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", path.read_text(encoding="utf-8")))
    assert mentioned - known_flags() == set()


@cache
def known_flags() -> frozenset[str]:
    own = {*full_parser()._option_string_actions, *flags_of(commands.command_parser()), *flags_of(own_flags())}
    scripts = "".join(help_text(path) for path in ROOT.glob("*.sh"))
    modules = (benchmark_flags(path) for path in (ROOT / "benchmarks").glob("*.py"))
    return frozenset(own.union(*modules, re.findall(r"--[a-z][a-z-]+", scripts), FOREIGN_FLAGS))


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of all its sub-commands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from flags_of(sub)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_settings_exist(path: Path) -> None:
    known = re.search(r'KNOWN_SETTINGS="([^"]+)"', (ROOT / "scripts/common.sh").read_text(encoding="utf-8"))
    assert known is not None
    names = set(known[1].replace("\\", " ").split())
    assert set(re.findall(r"\bREFIT_([A-Z][A-Z_]+[A-Z])", path.read_text(encoding="utf-8"))) <= names | {
        "MODE",
        "METHOD",
        "HOST",  # a rank's own, not the scripts'
    }


@pytest.mark.parametrize("message", documents.messages(TROUBLESHOOTING), ids=lambda message: message[:60])
def test_a_quoted_message_is_printed(message: str) -> None:
    assert is_printed(message), message


def is_printed(message: str) -> bool:
    failure = re.match(r"FAILED: rank \d+ failed in phase '(?P<phase>[^']+)': (?P<text>.+)", message)
    if failure is None:
        return says(message) or says(documents.MESSAGE.sub("", message))
    if not any(pattern.fullmatch(failure["phase"]) for pattern in phases()):
        return False
    return says(failure["text"]) or KNOWN_TO_PYTORCH.fullmatch(failure["text"]) is not None


def says(text: str) -> bool:
    return any(pattern.fullmatch(text) for pattern in templates())


@cache
def templates() -> list[re.Pattern[str]]:
    return messages.templates(ROOT)


@cache
def phases() -> list[re.Pattern[str]]:
    return messages.phases(ROOT / "refit")


def test_the_checks_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text(
        "# Title\n\n    make fly\n\n```\ntorchrun --nproc-per-node 1 benchmark_refit.py --model tiny \\\n"
        "    --refit-method gloo\nSEQ=1 ./missing.sh | python -m refit report --loud\n```\n\n[text](gone.md) [t](#no)\n"
    )
    found = documents.commands(path)
    assert [command.place for command in found] == ["wrong.md:3", *["wrong.md:6"] * 3]
    for command in found:
        with pytest.raises((AssertionError, UsageError)):
            check_for(command)(list(command.words[1:]))
    with pytest.raises(AssertionError):
        test_links_lead_somewhere(path)
    assert is_printed("error: source: 8 experts cannot be divided by EP size 3")
    assert not is_printed("error: source: 8 experts cannot be split by EP size 3")
    assert not is_printed("FAILED: rank 1 failed in phase 'lunch': took longer than the timeout of 300 s")
