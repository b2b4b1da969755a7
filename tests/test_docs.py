"""The documents are true: their commands work, the messages they quote are printed, their flags and links exist.

Dry runs and plans are made for real. What needs ranks, GPUs or Slurm is taken as far as its command line goes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from refit import commands
from refit.cli.flags import full_parser
from refit.commands.run import own_flags
from refit.errors import UsageError
from refit.sweep.selection import select_lines
from tests import documents, messages
from tests.command_checks import ALLOCATION_OPTIONS, benchmark_flags, check_for, help_text
from tests.documents import ROOT, Command

DOCUMENTS = documents.markdown_files()
COMMANDS = [command for path in DOCUMENTS for command in documents.commands(path)]
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"

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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_fresh_shell_finds_every_program(path: Path) -> None:
    """`make demo` installs them in `.venv`, which nothing puts on the PATH; some machines have no `python` at all."""
    bare = [c for c in documents.commands(path) if c.program in INSTALLED and not c.words[0].startswith(".venv")]
    assert bare == []


INSTALLED = ("python", "python3", "torchrun", "refit", "pip")


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
