"""Completion scripts for bash and zsh, generated from the parsers.

zsh runs the same functions through its own `bashcompinit` (zshcompsys(1), "Bash completion functions").
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from refit.config import yaml_files

FILES = {"--model": "models", "--cluster": "clusters", "--scenarios": "scenarios", "SCENARIOS": "scenarios"}
"""Flags and arguments that name files of a folder of `configs/`, where they have no choices of their own."""

BENCHMARK = "benchmark_refit.py"

TEMPLATE = """\
# Completion of `refit` and benchmark_refit.py: eval "$(refit completion {shell})"
{preamble}_refit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command={root} next index words
    for ((index = 1; index < COMP_CWORD; index++)); do
        next="$command ${{COMP_WORDS[index]}}"
        case $next in
{commands}) command=$next ;;
        esac
    done
    case $command in
{flags}
    esac
    case "$command $before" in
{values}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _refit refit
_refit_benchmark() {{
    COMP_WORDS=(refit run "${{COMP_WORDS[@]:1}}") COMP_CWORD=$((COMP_CWORD + 1))
    _refit
}}
complete -o default -F _refit_benchmark {benchmark} ./{benchmark}
"""
"""`words` are what may follow: a command's flags and steps, or the values of the flag before the cursor."""


@dataclass(frozen=True, slots=True)
class _Node:
    """What may follow a command, such as `refit sweep`: words, and the values of each flag that has some."""

    words: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


def completion_script(shell: str, parser: argparse.ArgumentParser, benchmark: argparse.ArgumentParser) -> str:
    """The script for `shell`, "bash" or "zsh". `refit run` and benchmark_refit.py take the flags of `benchmark`."""
    root = parser.prog
    nodes = _nodes(root, parser)
    nodes[f"{root} run"] = _node(benchmark)
    commands = "|".join(shlex.quote(name) for name in nodes if name != root)
    values = [
        f"        {shlex.quote(f'{name} {flag}')}) words={_quoted(values)} ;;"
        for name, node in nodes.items()
        for flag, values in node.values.items()
    ]
    return TEMPLATE.format(
        shell=shell,
        preamble="autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
        if shell == "zsh"
        else "",
        root=root,
        commands=f"            {commands}",
        flags="\n".join(f"        {shlex.quote(name)}) words={_quoted(node.words)} ;;" for name, node in nodes.items()),
        values="\n".join(values),
        benchmark=BENCHMARK,
    )


def _quoted(words: tuple[str, ...]) -> str:
    return shlex.quote(" ".join(words))


def _nodes(name: str, parser: argparse.ArgumentParser) -> dict[str, _Node]:
    """The node of a command and those of its visible sub-commands."""
    nodes = {name: _node(parser)}
    for command, sub in subcommands(parser).items():
        nodes |= _nodes(f"{name} {command}", sub)
    return nodes


def _node(parser: argparse.ArgumentParser) -> _Node:
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = [flag for action in shown for flag in action.option_strings if flag.startswith("--")]
    values = {flag: choices for action in shown for flag in action.option_strings if (choices := _choices(action))}
    arguments = [value for action in shown if not action.option_strings for value in _choices(action)]
    return _Node((*subcommands(parser), *arguments, *flags), values)


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """The values of a flag or an argument; empty where they cannot be listed."""
    if isinstance(action, argparse._SubParsersAction):
        return ()
    if action.choices is not None:
        return tuple(str(choice) for choice in action.choices)
    kinds = [FILES[key] for key in (*action.option_strings, str(action.metavar)) if key in FILES]
    return tuple(yaml_files.names(kinds[0])) if kinds else ()


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-commands that help lists, by name: those with a `help` text."""
    return {
        choice.dest: action.choices[choice.dest]
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
