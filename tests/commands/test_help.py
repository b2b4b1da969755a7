"""Help: what is shown, that every default and unit is in it, and what loading a command costs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from refit import commands
from refit.cli.flags import full_parser
from refit.cli.listing import listing
from refit.config import yaml_files

UNITS = {"MIB": "MiB", "SECONDS": "seconds"}
"""What a flag's value is called -> the unit that its help must name."""

SPELLED = {"max_slowdown": "5%", "timeout": "300"}
"""Defaults that help writes in another way than Python."""


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                yield from parsers(sub, f"{name} {command}")


EVERY = dict([*parsers(commands.command_parser(), "refit"), ("benchmark_refit.py", full_parser())])


@pytest.mark.parametrize("name", EVERY)
def test_every_default_and_unit_is_in_the_help(name: str) -> None:
    for action in EVERY[name]._actions:
        if not action.option_strings or action.help == argparse.SUPPRESS:
            continue
        text = action.help or ""
        assert text, action.option_strings
        if action.nargs == 0:
            continue
        stated = text.partition("default: ")[2]
        assert stated or ("required" in text), f"{name} {action.option_strings[0]}: {text}"
        given = isinstance(action.default, int | float | str) and action.default != argparse.SUPPRESS
        if given and action.dest != "job":  # the environment's
            assert stated.startswith(SPELLED.get(action.dest, f"{action.default}")), f"{name}: {text}"
        for metavar, unit in UNITS.items():
            assert action.metavar != metavar or unit in text


@pytest.mark.parametrize("name", EVERY)
def test_help_can_be_printed_at_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert EVERY[name].format_help()


def test_help_names_what_people_use_and_not_the_steps_of_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["--help"])
    text = capsys.readouterr().out
    assert text.index(" run ") < text.index(" report ") < text.index(" sweep ")
    assert "refit run --model tiny" in text
    for hidden in ("place", "outcome"):
        assert hidden not in text
    with pytest.raises(SystemExit):
        commands.main(["sweep", "--help"])
    assert "close the" not in capsys.readouterr().out


def test_refit_flags_come_first() -> None:
    text = full_parser().format_help()
    assert text.index("--refit-method") < text.index("--tensor-model-parallel-size") < text.index("--num-layers")


@pytest.mark.parametrize("words", [["run", "--list"], ["sweep", "--list"]])
def test_list_names_every_file_with_what_it_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    assert ended.value.code == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    names = [name for kind in ("models", "clusters", "scenarios") for name in yaml_files.names(kind)]
    assert [name for name, _ in lines] == names
    assert dict(lines)["kimi_k2"]


def test_a_command_imports_itself_alone() -> None:
    code = "import sys; from refit.commands import command_parser; command_parser('completion'); "
    code += "sys.exit(' '.join({'numpy', 'rich', 'msgspec', 'refit.commands.report'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_a_list_on_a_terminal_is_broken_below_its_sentences() -> None:
    whole, broken = listing(), listing(width=60)
    assert max(map(len, broken.splitlines())) <= 60 < max(map(len, whole.splitlines()))
    assert broken.split() == whole.split()
    named = {line.split()[0] for line in broken.splitlines() if re.match(r"  \S", line)}
    assert named == {name for kind in ("models", "clusters", "scenarios") for name in yaml_files.names(kind)}
