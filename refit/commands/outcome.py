"""`refit outcome`: the outcome of a single run, for the script that started it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from refit.cli import flag_types
from refit.report.refits.sweep_table import outcome_lines
from refit.report.terminal.console import show_text
from refit.results.runs import find_run
from refit.results.sweep import Attempt
from refit.sweep.close import Ending, close


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "outcome",
        description="After a run: complete its result, print its headline.",
        epilog="The exit code is the one in the result. A launcher's own may be 1 for any failure.",
    )
    parser.add_argument("stem", type=Path, metavar="STEM", help="path of the run's .log and .json without suffix")
    add_ending(parser)
    parser.set_defaults(run=_outcome)


def add_ending(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a run ended."""
    parser.add_argument(
        "--exit-code", type=int, required=True, metavar="N", help="exit code of the run's command; required"
    )
    parser.add_argument(
        "--timed-out",
        type=flag_types.seconds,
        metavar="SECONDS",
        help="run stopped after this time, in seconds; default: none",
    )
    parser.add_argument("--cancelled", action="store_true", help="the run was stopped by a signal")


def ending(args: argparse.Namespace) -> Ending:
    """The Ending that those flags describe."""
    return Ending(args.exit_code, args.timed_out, args.cancelled)


def _outcome(args: argparse.Namespace) -> int:
    attempt = Attempt(args.stem.absolute())
    result = close(attempt, ending(args))
    (outcome,) = find_run(attempt.json).outcomes
    show_text(outcome_lines(outcome.planned, result))
    return int(result.exit_code or 0)
