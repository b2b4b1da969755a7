"""`refit completion`: the script that completes commands, flags and their values in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from refit import commands
from refit.cli.completion import completion_script
from refit.cli.flags import full_parser
from refit.report.terminal.console import show


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "completion",
        help="completion of commands, flags and presets in bash and zsh",
        description="Print a completion script.",
        epilog='Put this into ~/.bashrc, or with zsh into ~/.zshrc:\n  eval "$(refit completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    show(completion_script(args.shell, commands.command_parser(), full_parser()))
    return 0
