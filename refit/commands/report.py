"""`refit report`: a run's summary and analysis, as text, Markdown or CSV."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refit.errors import ExitCode
from refit.report.analysis import analysis_text
from refit.report.console import show, show_aside
from refit.report.summary import summary_text
from refit.report.tables import csv_text, markdown_text
from refit.results.runs import Run, find_run
from refit.sweep.layouts import with_layouts


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="what a run measured, as text, Markdown or CSV",
        description="Print a run's summary and analysis. The exit code is 0 even if scenarios failed, 2 without a "
        "readable run, 4 if a damaged file was skipped (standard error names it).",
        epilog="example:\n  refit report benchmark_results --format markdown",
    )
    add_run_arguments(parser)
    parser.add_argument("--format", choices=list(FORMATS), default="text", help="what to print; default: text")
    parser.set_defaults(run=report)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that name one run on disk."""
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="a folder of results, a folder with a logs folder in it, a *_sweep.json, a result file or a collection",
    )
    parser.add_argument("--run-id", metavar="ID", help="which run of that folder; default: the latest")


def report(args: argparse.Namespace) -> int:
    """Print the run. Raises UsageError where there is none. 4 where a damaged file was skipped."""
    run = with_layouts(find_run(args.run_dir, args.run_id))
    show(FORMATS[args.format](run))
    return int(named_skipped(run))


def named_skipped(*runs: Run) -> ExitCode:
    """Name the damaged files of these runs on standard error: FAILED where there are any, else OK."""
    skipped = [error for run in runs for error in run.skipped]
    for error in skipped:
        show_aside(error.skipped)
    return ExitCode.FAILED if skipped else ExitCode.OK


def _text(run: Run) -> str:
    analysis = analysis_text(run.outcomes)
    return "\n\n".join([summary_text(run.sweep, run.outcomes), *([analysis] if analysis else [])])


FORMATS: Mapping[str, Callable[[Run], str]] = {
    "text": _text,
    "markdown": lambda run: markdown_text(run.sweep, run.outcomes),
    "csv": lambda run: csv_text(run.outcomes),
}
