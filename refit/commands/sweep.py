"""`refit sweep` and `refit place`: steps that scripts call before, between and after the runs of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from refit.cli.listing import add_list
from refit.commands import sweep_run, sweep_submit
from refit.commands.outcome import add_ending, ending
from refit.commands.sweep_parts import (
    add_allocation,
    add_beginning,
    add_only,
    add_selection,
    allocation,
    begun,
    selection,
    sum_up,
)
from refit.errors import ExitCode, UsageError
from refit.launch.host import Stop, ThisProcess
from refit.report.refits.sweep_table import outcome_lines, sweep_text
from refit.report.terminal.console import show, show_text, table_width
from refit.results.status import Status
from refit.results.sweep import Attempt, Sweep
from refit.sweep import check, run
from refit.sweep.close import close


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register both commands."""
    parser = subparsers.add_parser(
        "sweep",
        help="plan and run lists of scenarios",
        epilog="example:\n  refit sweep plan --scenarios kimi_k2 --cluster h100_ib400\n"
        "  refit sweep run --scenarios tiny --cpu-fallback --output-dir results\n\n"
        "Scripts take further steps: task, begin, add-job, pending, close, end.",
    )
    add_list(parser)
    parts = parser.add_subparsers(metavar="STEP", required=True)
    _add_plan(parts)
    sweep_run.add(parts)
    sweep_submit.add(parts)
    for add_part in (_add_begin, _add_pending, _add_close, _add_end):
        add_part(parts)
    _add_place(subparsers)


def _add_plan(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser(
        "plan",
        help="check every scenario and print what it needs",
        epilog="Exit code 2: a scenario is refused.",
    )
    add_selection(parser)
    add_allocation(parser)
    parser.set_defaults(run=_plan)


def _add_begin(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser("begin", description="Plan, write the sweep file and print its path.")
    add_beginning(parser)
    parser.set_defaults(run=_begin)


def _add_pending(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser(
        "pending",
        description="Print one line per scenario to run: NAME, NODES, RANKS_PER_NODE, STEM and FLAGS, separated by "
        "tabs. The attempt's files are STEM with a suffix; FLAGS are separated by tabs too. By default these are "
        "the scenarios without a finished result.",
    )
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    add_only(parser)
    parser.set_defaults(run=_pending)


def _add_close(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser("close", description="After an attempt: complete its result, print its headline.")
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--stem", type=Path, required=True, help="the STEM that `pending` printed; required")
    add_ending(parser)
    parser.set_defaults(run=_close)


def _add_end(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser(
        "end",
        description="Write and print the summary.",
        epilog="Exit code 1: wrong data in a scenario; else 4: one failed, was refused or has no result; else 3: all "
        "waived.",
    )
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    parser.set_defaults(run=_end)


def _add_place(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "place",
        usage="refit place [options] -- FLAGS OF benchmark_refit.py",
        description="Check one scenario and print what to start: lines of a name, a tab and a value: num_ranks, "
        "nodes, ranks_per_node, note, and flag for each word of the command line.",
    )
    add_allocation(parser)
    parser.set_defaults(run=_place)


def _plan(args: argparse.Namespace) -> int:
    sweep = run.plan(selection(args), allocation(args))
    show_text(sweep_text(sweep, table_width()))
    refused = any(planned.status is Status.REFUSED for planned in sweep.scenarios)
    return int(ExitCode.USAGE if refused else ExitCode.OK)


def _begin(args: argparse.Namespace) -> int:
    with sweep_run.held(args, ThisProcess(Stop())):
        show(str(begun(args)))
    return 0


def _pending(args: argparse.Namespace) -> int:
    sweep, directory = Sweep.read(args.sweep_file), args.sweep_file.absolute().parent
    chosen = run.pending(sweep, directory, args.only or "unfinished")
    for planned in chosen:
        task = run.task(sweep, directory, planned)
        show(_fields(task.name, str(task.nodes), str(task.ranks_per_node), str(task.stem), *task.flags))
    return 0


def _close(args: argparse.Namespace) -> int:
    planned = Sweep.read(args.sweep_file).scenario(args.name)
    show_text(outcome_lines(planned, close(Attempt(args.stem.absolute()), ending(args))))
    return 0


def _end(args: argparse.Namespace) -> int:
    return sum_up(args.sweep_file)


def _place(args: argparse.Namespace) -> int:
    flags, note = check.on_cpus(args.flags) if args.cpu_fallback else (args.flags, "")
    gpus = allocation(args)
    scenario, _ = check.checked(flags, gpus.options, gpus.machine)
    if gpus.cluster is not None and scenario.cluster is None:
        flags = [*flags, f"--cluster={gpus.cluster}"]
    gpus_per_node = None if args.cpu_fallback else gpus.gpus_per_node
    placement = check.place(scenario.num_ranks, gpus_per_node, scenario.ranks_per_gpu)
    lines = [
        _fields("num_ranks", str(placement.num_ranks)),
        _fields("nodes", str(placement.nodes)),
        _fields("ranks_per_node", str(placement.ranks_per_node)),
        _fields("note", note),
        *(_fields("flag", word) for word in flags),
    ]
    show("\n".join(lines))
    return 0


def _fields(*fields: str) -> str:
    """One line for scripts. Raises UsageError for a field that would break it."""
    for field in fields:
        if any(ord(character) < 32 or ord(character) == 127 for character in field):
            raise UsageError(f"{field!a} cannot go to a script: leave tabs, line breaks and control characters out")
    return "\t".join(fields)
