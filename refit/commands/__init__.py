"""The console command `refit`: sweeps, reports and comparisons. One module per sub-command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import refit
from refit.cli.flag_parser import FlagParser
from refit.commands import bounds, compare, outcome, plot, report, run, sweep
from refit.errors import RefitError, UsageError
from refit.report.console import ending_quietly, show_error


def main_from_shell() -> int:
    """The entry point of the installed command."""
    return main(sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code, that of a closed pipe included. Errors are printed once.

    Words after `--` are flags of benchmark_refit.py (`args.flags`), for the commands that take them; after `run` all
    words are.
    """
    return ending_quietly(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["run"]:
        argv = ["run", "--", *(word for word in argv[1:] if word != "--")]
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        args = command_parser().parse_args(argv[:end], argparse.Namespace(flags=list(argv[end + 1 :])))
        if args.flags and not args.takes_flags:
            raise UsageError(f"flags after -- mean nothing here: {args.flags[0]}")
        code: int = args.run(args)
    except RefitError as error:
        show_error(str(error))
        return int(error.exit_code)
    return code


def command_parser() -> FlagParser:
    """The parser of `refit` with all its sub-commands."""
    parser = FlagParser(prog="refit", description="Plan, run and compare refit benchmarks.")
    parser.set_defaults(takes_flags=False)
    parser.add_argument("--version", action="version", version=f"refit-benchmark {refit.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (run, report, compare, plot, bounds, sweep, outcome):
        module.add(subparsers)
    return parser
