"""`refit plot`: draw a run as pictures."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from refit.commands.report import add_run_arguments, named_skipped
from refit.report.plots import draw
from refit.report.terminal.console import show
from refit.results.plain import plain
from refit.results.runs import find_run
from refit.sweep.pairs import pair_bytes


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plot",
        help="draw a run as pictures",
        description="Draw, as PNG: times beside lower bounds, refits in order, phases, time against bytes, and the "
        "bytes of each rank and of each pair of ranks. Needs matplotlib (exit code 3 without). Pictures of the same "
        "name are replaced. Exit code 4 if a damaged file was skipped.",
        epilog="example:\n  refit plot benchmark_results --output-dir pictures",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder of the pictures; default: <RUN_ID>_plots beside the results",
    )
    parser.set_defaults(run=plot)


def plot(args: argparse.Namespace) -> int:
    """Draw the pictures and print their paths. Raises UsageError without a run, UnavailableError without matplotlib."""
    run = find_run(args.run_dir, args.run_id)
    pairs = partial(pair_bytes, gpus_per_node=run.sweep.gpus_per_node)
    for drawn in draw(run, args.output_dir or run.directory / f"{run.sweep.run_id}_plots", pairs):
        show(plain(str(drawn)))
    return int(named_skipped(run))
