"""What the steps of `refit sweep` share: the flags that choose scenarios and GPUs, the beginning and the summary."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refit.cli import flag_types
from refit.config.limits import MAX_SCENARIOS
from refit.errors import ExitCode, UsageError
from refit.predict import cpus
from refit.report.refits.summary import summary_text
from refit.report.refits.sweep_table import sweep_text
from refit.report.steps.dispatchers import dispatcher_text
from refit.report.steps.overlap import overlap_text
from refit.report.steps.step_tables import write_step_tables
from refit.report.steps.trainers import trainer_text
from refit.report.terminal.console import show, show_aside, show_text, table_width
from refit.report.terminal.escaped import FILE_WIDTH
from refit.results.outcomes import Outcome, load_outcomes
from refit.results.plain import plain
from refit.results.status import Status
from refit.results.sweep import Sweep
from refit.sweep import run
from refit.sweep.selection import Selection, select_file, select_lines

LINE_FORM = "SRC_TP:SRC_EP:DST_TP:DST_EP:REFIT_MODE:REFIT_METHOD:DESCRIPTION"
LOGS = "logs"
GPUS_PER_NODE = 8


def add_beginning(parser: argparse.ArgumentParser, needs_output: bool = True) -> None:
    """The flags of `begun`."""
    add_selection(parser)
    add_allocation(parser)
    need = "required" if needs_output else "default: none, for --dry-run only"
    parser.add_argument(
        "--output-dir", type=Path, required=needs_output, metavar="DIR", help=f"files go to DIR/logs; {need}"
    )
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--run-id", metavar="ID", help="prefix of file names; default: local time and job")
    names.add_argument(
        "--resume", metavar="RUN_ID", help="continue an earlier sweep, without a selection; default: none"
    )
    parser.add_argument(
        "--job", metavar="ID", default=os.environ.get("SLURM_JOB_ID"), help="the Slurm job; default: SLURM_JOB_ID"
    )


def add_only(parser: argparse.ArgumentParser) -> None:
    """The flag that chooses among the scenarios of a sweep."""
    parser.add_argument(
        "--only",
        choices=("failed",),
        help="scenarios whose last attempt did not succeed, or that have no attempt; default: unfinished ones",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
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


def add_allocation(parser: argparse.ArgumentParser) -> None:
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


def selection(args: argparse.Namespace) -> Selection:
    if args.config:
        selection = select_lines(args.config, args.flags, args.title)
    elif args.scenarios:
        selection = select_file(args.scenarios, args.flags, args.title)
    else:
        raise UsageError("no scenarios: give --config LINE, once for each, or --scenarios NAME")
    return replace(selection, num_runs=args.num_runs)


def allocation(args: argparse.Namespace, before: Sweep | None = None) -> run.Allocation:
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


def begun(args: argparse.Namespace, brings_nodes: bool = False) -> Path:
    """Begin or resume a sweep, print its table, and return the path of its file.

    `brings_nodes`: each scenario gets as many GPUs as it needs, unless `--num-gpus` says how many there are.
    """
    directory = (args.output_dir / LOGS).absolute()
    if args.resume is not None:
        if args.config or args.scenarios or args.flags or args.title or args.num_runs > 1:
            raise UsageError("--resume goes on with the scenarios and flags of the earlier sweep: leave all others out")
        sweep = run.find(directory, args.resume)
        for line in run.misplaced(sweep, directory):
            show_aside(plain(line))
        path = run.resume(sweep, directory, allocation(args, sweep), args.job)
    else:
        if args.num_gpus is None and not args.cpu_fallback and not brings_nodes:
            raise UsageError("--num-gpus missing: how many GPUs may the sweep use?")
        path = run.begin(selection(args), allocation(args), directory, args.run_id, args.job)
    show_aside(sweep_text(_as_it_stands(Sweep.read(path), directory), table_width(sys.stderr)))
    return path


def _as_it_stands(sweep: Sweep, directory: Path) -> Sweep:
    """`sweep` with the outcomes that its scenarios already have, in place of those of its check."""
    outcomes = load_outcomes(sweep, directory)
    return replace(
        sweep,
        scenarios=tuple(
            replace(outcome.planned, status=outcome.status, reason=outcome.reason)
            if outcome.status.has_ended
            else outcome.planned
            for outcome in outcomes
        ),
    )


def sum_up(sweep_file: Path) -> int:
    """Write and print the summary of a sweep. Returns the exit code of all its outcomes."""
    sweep, directory = Sweep.read(sweep_file), sweep_file.absolute().parent
    outcomes = load_outcomes(sweep, directory)
    path = directory / f"{sweep.run_id}_summary.txt"
    path.write_text(f"{_summary(sweep, outcomes, FILE_WIDTH)}\n", encoding="utf-8")
    show_text(_summary(sweep, outcomes, table_width()))
    show(f"Summary: {path}")
    for table in write_step_tables(outcomes, directory, sweep.run_id):
        show(f"Table: {table}")
    return int(_exit_code([outcome.status for outcome in outcomes]))


def _summary(sweep: Sweep, outcomes: Sequence[Outcome], width: int) -> str:
    steps = (text(outcomes, width) for text in (dispatcher_text, overlap_text, trainer_text))
    return "\n\n".join(filter(None, [summary_text(sweep, outcomes, width), *steps])).rstrip("\n")


def _exit_code(statuses: list[Status]) -> ExitCode:
    judged = [status for status in statuses if status is not Status.SKIPPED]
    if Status.WRONG_DATA in judged:
        return ExitCode.WRONG_DATA
    if set(judged) - {Status.OK, Status.WAIVED}:
        return ExitCode.FAILED
    return ExitCode.OK if Status.OK in judged else ExitCode.WAIVED
