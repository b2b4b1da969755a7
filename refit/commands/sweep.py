"""`refit sweep` and `refit place`: steps that scripts call before, between and after the runs of a sweep."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from refit.cli import flag_types
from refit.cli.listing import add_list
from refit.commands.outcome import add_ending, ending
from refit.config.limits import MAX_SCENARIOS
from refit.errors import ExitCode, UsageError
from refit.predict import cpus
from refit.report.console import show, show_aside, show_text, table_width
from refit.report.dispatchers import dispatcher_text
from refit.report.overlap import overlap_text
from refit.report.step_tables import write_step_tables
from refit.report.summary import summary_text
from refit.report.sweep_table import outcome_lines, sweep_text
from refit.report.trainers import trainer_text
from refit.results.outcomes import load_outcomes
from refit.results.plain import plain
from refit.results.status import Status
from refit.results.sweep import Attempt, Sweep
from refit.sweep import check, run
from refit.sweep.close import close
from refit.sweep.selection import Selection, select_file, select_lines

LINE_FORM = "SRC_TP:SRC_EP:DST_TP:DST_EP:REFIT_MODE:REFIT_METHOD:DESCRIPTION"
LOGS = "logs"
GPUS_PER_NODE = 8


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register both commands."""
    parser = subparsers.add_parser(
        "sweep",
        help="plan lists of scenarios, as the scripts run them",
        epilog="example:\n  refit sweep plan --scenarios kimi_k2 --cluster h100_ib400\n\n"
        "Scripts take further steps: begin, pending, close, end.",
    )
    add_list(parser)
    parts = parser.add_subparsers(metavar="STEP", required=True)
    for add_part in (_add_plan, _add_begin, _add_pending, _add_close, _add_end):
        add_part(parts)
    _add_place(subparsers)


def _add_plan(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser(
        "plan",
        help="check every scenario and print what it needs",
        epilog="Exit code 2: a scenario is refused.",
    )
    _add_selection(parser)
    _add_allocation(parser)
    parser.set_defaults(run=_plan)


def _add_begin(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser("begin", description="Plan, write the sweep file and print its path.")
    _add_selection(parser)
    _add_allocation(parser)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="files go to DIR/logs; required")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--run-id", metavar="ID", help="prefix of file names; default: local time and job")
    names.add_argument(
        "--resume", metavar="RUN_ID", help="continue an earlier sweep, without a selection; default: none"
    )
    parser.add_argument(
        "--job", metavar="ID", default=os.environ.get("SLURM_JOB_ID"), help="the Slurm job; default: SLURM_JOB_ID"
    )
    parser.set_defaults(run=_begin)


def _add_pending(parts: argparse._SubParsersAction[Any]) -> None:
    parser = parts.add_parser(
        "pending",
        description="Print one line per scenario to run: NAME, NODES, RANKS_PER_NODE, STEM and FLAGS, separated by "
        "tabs. The attempt's files are STEM with a suffix; FLAGS are separated by tabs too. By default these are "
        "the scenarios without a finished result.",
    )
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    parser.add_argument(
        "--only",
        choices=("failed",),
        help="scenarios whose last attempt did not succeed, or that have no attempt; default: unfinished ones",
    )
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
    _add_allocation(parser)
    parser.set_defaults(run=_place)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{parser.epilog or ''} Flags of benchmark_refit.py for all scenarios may follow after --.".strip()
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--config",
        action="append",
        metavar="LINE",
        help=f"a scenario as {LINE_FORM}; may be repeated; default: those of --scenarios",
    )
    group.add_argument("--scenarios", metavar="NAME", help="a list of configs/scenarios, or a YAML file; default: none")
    parser.add_argument("--title", metavar="TEXT", help="title of the summary; default: the list's")
    parser.add_argument(
        "--num-runs",
        type=flag_types.up_to(MAX_SCENARIOS),
        default=1,
        metavar="N",
        help="run each scenario N times, interleaved (A B A B); default: 1",
    )


def _add_allocation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-gpus", type=flag_types.positive, metavar="N", help="GPUs available; default: as many as needed"
    )
    parser.add_argument("--gpus-per-node", type=flag_types.positive, metavar="N", help="GPUs of a node; default: 8")
    parser.add_argument(
        "--cluster", metavar="NAME", help="memory and link speeds, from configs/clusters; default: none"
    )
    parser.add_argument(
        "--cpu-fallback",
        action="store_true",
        help="there is no GPU: ranks run on this machine's CPUs, and a scenario too large for them is refused; `place` "
        "also replaces a GPU method by its stand-in",
    )
    parser.set_defaults(takes_flags=True)


def _selection(args: argparse.Namespace) -> Selection:
    if args.config:
        selection = select_lines(args.config, args.flags, args.title)
    elif args.scenarios:
        selection = select_file(args.scenarios, args.flags, args.title)
    else:
        raise UsageError("no scenarios: give --config LINE, once for each, or --scenarios NAME")
    return replace(selection, num_runs=args.num_runs)


def _allocation(args: argparse.Namespace, before: Sweep | None = None) -> run.Allocation:
    """The allocation that flags describe. A resumed sweep keeps the values of `before` for flags not given.

    On CPUs every scenario is on one node, with as many ranks as it needs.
    """
    machine = cpus.this_machine() if args.cpu_fallback else None
    if machine is not None:
        before = None
    cluster = args.cluster or (before.cluster if before else None)
    return run.Allocation(
        num_gpus=args.num_gpus or (before.num_gpus if before else None),
        gpus_per_node=args.gpus_per_node
        or (before.gpus_per_node if before else cpus.most_cpu_ranks(machine) if machine else GPUS_PER_NODE),
        cluster=str(Path(cluster).absolute()) if cluster and cluster.endswith((".yaml", ".yml")) else cluster,
        machine=machine,
    )


def _plan(args: argparse.Namespace) -> int:
    sweep = run.plan(_selection(args), _allocation(args))
    show_text(sweep_text(sweep, table_width()))
    refused = any(planned.status is Status.REFUSED for planned in sweep.scenarios)
    return int(ExitCode.USAGE if refused else ExitCode.OK)


def _begin(args: argparse.Namespace) -> int:
    directory = (args.output_dir / LOGS).absolute()
    if args.resume is not None:
        if args.config or args.scenarios or args.flags or args.title or args.num_runs > 1:
            raise UsageError("--resume goes on with the scenarios and flags of the earlier sweep: leave all others out")
        sweep = run.find(directory, args.resume)
        for line in run.misplaced(sweep, directory):
            show_aside(plain(line))
        path = run.resume(sweep, directory, _allocation(args, sweep), args.job)
    else:
        if args.num_gpus is None and not args.cpu_fallback:
            raise UsageError("--num-gpus missing: how many GPUs may the sweep use?")
        path = run.begin(_selection(args), _allocation(args), directory, args.run_id, args.job)
    show_aside(sweep_text(Sweep.read(path), table_width(sys.stderr)))
    show(str(path))
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
    sweep, directory = Sweep.read(args.sweep_file), args.sweep_file.absolute().parent
    outcomes = load_outcomes(sweep, directory)
    steps = dispatcher_text(outcomes), overlap_text(outcomes), trainer_text(outcomes)
    texts = summary_text(sweep, outcomes), *steps
    text = "\n\n".join(filter(None, texts))
    path = directory / f"{sweep.run_id}_summary.txt"
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    show_text(text.rstrip("\n"))
    show(f"Summary: {path}")
    for table in write_step_tables(outcomes, directory, sweep.run_id):
        show(f"Table: {table}")
    return int(_exit_code([outcome.status for outcome in outcomes]))


def _exit_code(statuses: list[Status]) -> ExitCode:
    judged = [status for status in statuses if status is not Status.SKIPPED]
    if Status.WRONG_DATA in judged:
        return ExitCode.WRONG_DATA
    if set(judged) - {Status.OK, Status.WAIVED}:
        return ExitCode.FAILED
    return ExitCode.OK if Status.OK in judged else ExitCode.WAIVED


def _place(args: argparse.Namespace) -> int:
    flags, note = check.on_cpus(args.flags) if args.cpu_fallback else (args.flags, "")
    allocation = _allocation(args)
    scenario, _ = check.checked(flags, allocation.options, allocation.machine)
    if allocation.cluster is not None and scenario.cluster is None:
        flags = [*flags, f"--cluster={allocation.cluster}"]
    gpus_per_node = None if args.cpu_fallback else allocation.gpus_per_node
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
