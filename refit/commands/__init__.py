"""The console command `refit`: one module per sub-command, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

import refit
from refit.cli.flag_parser import FlagParser
from refit.config import plugins
from refit.errors import CANCELLED, RefitError, UsageError
from refit.report.terminal.console import ending_quietly, show_error

NAMED_AFTER_MODULES = (
    "run",
    "report",
    "compare",
    "plot",
    "bounds",
    "search",
    "sweep",
    "calibrate",
    "completion",
    "outcome",
)
COMMANDS: Mapping[str, str] = {**{name: name for name in NAMED_AFTER_MODULES}, "place": "sweep"}
"""Every command and its module, in the order in which `refit --help` names them. Steps for scripts (`outcome`, `place`)
have no `help` text, so that help leaves them out."""

EXAMPLES = """\
examples:
  refit run --list
  refit run --model tiny --refit-method gloo --rl-inference-tensor-model-parallel-size 2
  refit run --model kimi_k2 --expert-model-parallel-size 64 --dry-run
  refit report benchmark_results
  eval "$(refit completion bash)"

`refit COMMAND --help` describes a command."""


def main_from_shell() -> int:
    """The entry point of the installed command."""
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:  # before there is anything to end in order
        return CANCELLED


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code, that of a closed pipe included. Errors are printed once.

    Words after `--` are flags of benchmark_refit.py (`args.flags`), for the commands that take them; after `run` all
    words are. Every command takes `--plugin MODULE` before them.
    """
    return ending_quietly(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["run"]:
        argv = ["run", "--", *(word for word in argv[1:] if word != "--")]
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        plugins.load_plugins(argv)
        argv = [*(own := plugins.without(argv[:end])), *argv[end:]]
        end = len(own)
        namespace = argparse.Namespace(flags=list(argv[end + 1 :]))
        args, unknown = command_parser(*argv[:1]).parse_known_args(argv[:end], namespace)
        if unknown:
            raise _unknown(unknown[0], args.takes_flags)
        if args.flags and not args.takes_flags:
            raise UsageError(f"flags after -- mean nothing here: {args.flags[0]}")
        code: int = args.run(args)
    except RefitError as error:
        show_error(str(error))
        return int(error.exit_code)
    return code


def _unknown(word: str, takes_flags: bool) -> UsageError:
    """The error for a word that a command does not know. Flags of a scenario have their place."""
    from refit.cli.flags import full_parser

    flag = word.partition("=")[0]
    if takes_flags and flag in full_parser()._option_string_actions:
        return UsageError(f"{flag} is a flag of benchmark_refit.py: give it at the end, after --, as in -- {word} ...")
    return UsageError(f"unrecognized arguments: {word}: --help lists those that are known")


def command_parser(command: str = "") -> FlagParser:
    """The parser of `refit`: with that command alone, or with all where there is none of this name."""
    parser = FlagParser(prog="refit", description="Plan, run and compare refit benchmarks.", epilog=EXAMPLES)
    parser.set_defaults(takes_flags=False)
    parser.add_argument("--version", action="version", version=f"refit-benchmark {refit.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    needed = [command] if command in COMMANDS else [] if command == "--version" else COMMANDS
    names = dict.fromkeys(COMMANDS[name] for name in needed)
    for name in names:
        importlib.import_module(f"refit.commands.{name}").add(subparsers)
    return parser
