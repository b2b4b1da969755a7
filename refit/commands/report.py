"""`refit report`: what runs measured, as text, Markdown, CSV, JSON or one HTML page."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refit.errors import ExitCode, UnavailableError, UsageError
from refit.report.plots import draw
from refit.report.refits.analysis import analysis_text
from refit.report.refits.export import Record, csv_text, json_text, records, sample_records
from refit.report.refits.latex import latex_table
from refit.report.refits.markdown import markdown_report
from refit.report.refits.page import Pictures, page
from refit.report.refits.printed import printed_page
from refit.report.refits.summary import summary_text
from refit.report.steps.dispatchers import dispatcher_text
from refit.report.steps.overlap import overlap_text
from refit.report.steps.step_tables import write_step_tables
from refit.report.steps.trainers import trainer_text
from refit.report.terminal import live
from refit.report.terminal.console import show, show_aside, show_text, table_width
from refit.results.reading import UnreadableFile
from refit.results.runs import Run, find_run
from refit.sweep.layouts import with_layouts
from refit.sweep.pairs import pair_bytes


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="what runs measured, as text, Markdown, CSV, JSON or HTML",
        description="Print the summary and analysis of one or several runs. The exit code is 0 even if scenarios "
        "failed, 2 without a readable run, 4 if a damaged file was skipped (standard error names it).",
        epilog="examples:\n  refit report benchmark_results/kimi_k2\n"
        "  refit report --format html benchmark_results/*/logs/*_sweep.json > report.html",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help=RUN_DIR_HELP)
    add_run_id(parser)
    parser.add_argument(
        "--format",
        choices=[*PAGES, *TABLES],
        default="text",
        help="csv and json have one row per scenario and engine, html is one file with pictures, latex a table for a "
        "paper; default: text",
    )
    parser.add_argument(
        "--one-page", action="store_true", help="with html: the results and one picture, to be printed on one page"
    )
    parser.add_argument("--samples", action="store_true", help="with csv or json: one row per refit and rank")
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="DIR",
        help="also write index.csv, one row per run, and of each run's training steps the loss curve and a JSON; "
        "default: none",
    )
    parser.set_defaults(run=report)


RUN_DIR_HELP = "a folder of results, a folder with a logs folder in it, a *_sweep.json, a result file or a collection"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that name one run on disk."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=RUN_DIR_HELP)
    add_run_id(parser)


def add_run_id(parser: argparse.ArgumentParser) -> None:
    """The flag that chooses among several runs of a folder."""
    parser.add_argument("--run-id", metavar="ID", help="which run of that folder; default: the latest")


def report(args: argparse.Namespace) -> int:
    """Print the runs. Raises UsageError where one does not exist or none can be read. 4 where a file was skipped."""
    if args.samples and args.format not in TABLES:
        raise UsageError(f"--samples is a table for programs: give --format {' or '.join(TABLES)} with it")
    if args.one_page and args.format != "html":
        raise UsageError("--one-page is a page to print: give --format html with it")
    if args.format == "html" and live.is_terminal(sys.stdout):
        raise UsageError("--format html writes a file for browsers, not for a terminal: add > report.html")
    if args.run_id is not None and len(args.run_dirs) > 1:
        raise UsageError(f"--run-id names a run of one folder, {len(args.run_dirs)} are given: name the files instead")
    runs, damaged = _find(args.run_dirs, args.run_id)
    if args.format in TABLES:
        rows = sample_records(runs) if args.samples else records(runs)
        show(TABLES[args.format](rows))
    elif args.one_page:
        _show_page(runs, one_page=True)
    else:
        PAGES[args.format](runs)
    if args.tables is not None:
        for path in (each for run in runs for each in write_step_tables(run.outcomes, args.tables, run.sweep.run_id)):
            show_aside(f"wrote {path}")
    return int(named_skipped(*runs, damaged=damaged))


def _find(paths: Sequence[Path], run_id: str | None) -> tuple[list[Run], list[UnreadableFile]]:
    """The runs that can be read, and the damaged files among `paths`. Raises UsageError without a readable run."""
    runs, damaged = [], []
    for path in paths:
        try:
            runs.append(with_layouts(find_run(path, run_id)))
        except UnreadableFile as error:
            damaged.append(error)
    if not runs:
        raise damaged[0]
    return runs, damaged


def named_skipped(*runs: Run, damaged: Sequence[UnreadableFile] = ()) -> ExitCode:
    """Name the damaged files, those of runs too, on standard error: FAILED where there are any, else OK."""
    skipped = [*damaged, *(error for run in runs for error in run.skipped)]
    for error in skipped:
        show_aside(error.skipped)
    return ExitCode.FAILED if skipped else ExitCode.OK


def _show_summaries(runs: Sequence[Run]) -> None:
    """The summary of each run and its analysis."""
    parts = [part for run in runs for part in _parts(run)]
    show_text("\n\n".join(part for part in parts if part))


def _parts(run: Run) -> tuple[str, ...]:
    outcomes, width = run.outcomes, table_width()
    steps = (text(outcomes, width) for text in (dispatcher_text, overlap_text, trainer_text))
    return summary_text(run.sweep, outcomes, width), *steps, analysis_text(outcomes)


def _show_page(runs: Sequence[Run], one_page: bool = False) -> None:
    """The HTML page, with the pictures of every run where matplotlib is installed; or what prints on one."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = [_pictures(run, Path(folder) / str(number)) for number, run in enumerate(runs)]
        show(printed_page(runs, pictures) if one_page else page(runs, pictures))


def _pictures(run: Run, folder: Path) -> Pictures:
    try:
        drawn = list(draw(run, folder, partial(pair_bytes, gpus_per_node=run.sweep.gpus_per_node)))
    except UnavailableError as error:
        return Pictures(missing=(str(error),))
    paths = tuple(each for each in drawn if isinstance(each, Path))
    return Pictures(paths, tuple(each for each in drawn if isinstance(each, str)))


PAGES: Mapping[str, Callable[[Sequence[Run]], None]] = {
    "text": _show_summaries,
    "markdown": lambda runs: show("\n\n".join(map(markdown_report, runs))),
    "latex": lambda runs: show("\n\n".join(map(latex_table, runs))),
    "html": _show_page,
}
TABLES: Mapping[str, Callable[[Sequence[Record]], str]] = {"csv": csv_text, "json": json_text}
