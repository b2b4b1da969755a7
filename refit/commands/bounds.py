"""`refit bounds`: tables of lower bounds for scenario files on several clusters, as in docs/scenarios.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refit.cli.parsing import parse
from refit.config import yaml_files
from refit.config.clusters import Cluster, load_cluster
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run
from refit.report.plans.bounds_table import bounds_table
from refit.report.terminal.console import show, terminal_width
from refit.report.terminal.escaped import markdown_text
from refit.results.plain import plain
from refit.sweep.parallel import plan_all
from refit.sweep.selection import Candidate, Selection, select_file

BEGIN, END = "<!-- tables:", "<!-- end of tables -->"


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bounds",
        help="bytes and lower bounds of scenarios",
        description="Print a table per scenario file: GPUs, bytes, memory and the lower bound on each cluster. It is "
        "Markdown but on a terminal.",
        epilog="example:\n  refit bounds kimi_k2 --cluster h100_ib400 gb200_nvl72",
    )
    parser.add_argument("scenarios", nargs="+", metavar="SCENARIOS", help="a file of configs/scenarios, or a YAML file")
    parser.add_argument(
        "--cluster",
        nargs="+",
        dest="clusters",
        metavar="NAME",
        default=yaml_files.names("clusters"),
        help="files of configs/clusters, or YAML files; default: all of configs/clusters",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help=f"write the tables into this file, between {BEGIN} ... and {END}; default: print them",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables or write them into a file. Raises UsageError for a scenario that cannot run on any GPUs."""
    clusters = [load_cluster(name) for name in args.clusters]
    width = terminal_width(sys.stdout) if args.into is None else None
    tables = "\n\n".join(section(select_file(name, []), clusters, width) for name in args.scenarios)
    if args.into is None:
        show(tables)
    else:
        args.into.write_text(inserted(args.into, tables), encoding="utf-8")
    return 0


def inserted(path: Path, tables: str) -> str:
    """The text of `path` with `tables` between its markers. Raises UsageError where it has none."""
    try:
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    command, _, tail = rest.partition("-->\n")
    _, end, after = tail.partition(END)
    if not end:
        raise UsageError(f"{path} has no place for tables: a line `{BEGIN} ... -->` and one `{END}`")
    return f"{before}{begin}{command}-->\n\n{tables}\n\n{end}{after}"


def section(selection: Selection, clusters: Sequence[Cluster], width: int | None = None) -> str:
    """A heading and the table of one file's scenarios, as `bounds_table` gives it."""
    names = [candidate.name for candidate in selection.candidates]
    options = DryRunOptions(compared=tuple(clusters))
    runs = dict(zip(names, plan_all(selection.candidates, partial(_plan, options=options)), strict=True))
    title = f"### {markdown_text(selection.title)}" if width is None else plain(selection.title)
    return f"{title}\n\n{bounds_table(runs, clusters, width)}"


def _plan(candidate: Candidate, options: DryRunOptions) -> DryRun:
    return dry_run(parse(candidate.flags).scenario, options)
