"""`refit compare`: compare two runs, with an exit code for CI."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from refit.commands.report import named_skipped
from refit.errors import UsageError
from refit.report.plots.changes import draw_changes
from refit.report.refits.compare import Comparison, compare_runs, compare_text, exit_code
from refit.report.terminal.console import show, show_text, table_width
from refit.results.plain import plain
from refit.results.runs import Run, find_run


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two runs; exit code 5 if the new one is slower",
        description="Compare the medians of two runs, scenario by scenario. The exit code is the first that holds: 2 "
        "nothing to compare, 1 wrong data in NEW, 4 a scenario that was ok in OLD has no valid result in NEW (of "
        "several runs, a smaller share has; between two sweeps, also where it is gone), or a damaged file was skipped, "
        "5 slower than allowed, 0.",
        epilog="example:\n  refit compare last_week/logs benchmark_results/logs --max-slowdown 3%",
    )
    for name in ("old", "new"):
        parser.add_argument(
            name,
            type=Path,
            metavar=name.upper(),
            help="a folder of results (its latest sweep), a *_sweep.json or a result file",
        )
    parser.add_argument(
        "--max-slowdown",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="largest allowed increase of a median, as 5%% or 0.05; default: 5%%",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="also draw both medians of every scenario into this file; default: no picture",
    )
    parser.set_defaults(run=compare)


def share(text: str) -> float:
    """`5%` or `0.05` as 0.05; raises ArgumentTypeError for less than 0 or no number."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a share of at least 0, such as 5% or 0.05, not {text!r}")
    return value


def compare(args: argparse.Namespace) -> int:
    """Print the comparison and return its exit code. Raises UsageError where nothing can be compared or drawn."""
    old, new = find_run(args.old), find_run(args.new)
    comparison = compare_runs(old, new)
    show_text(compare_text(old, new, comparison, args.max_slowdown, table_width()))
    if args.plot is not None:
        show(plain(f"Picture: {_drawn(old, new, comparison, args.plot)}"))
    named_skipped(old, new)
    return int(exit_code(old, new, comparison, args.max_slowdown))


def _drawn(old: Run, new: Run, comparison: Comparison, path: Path) -> Path:
    try:
        return draw_changes(old, new, comparison, path)
    except OSError as error:
        raise UsageError(f"--plot {path} cannot be written: {error.strerror}: give another file") from None
