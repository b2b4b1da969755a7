"""`refit sweep submit` and `refit sweep cancel`: jobs of a cluster that run without this process."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from refit.commands.launching import add_launcher, check_pending, environment, fit, goes_on, launcher_class
from refit.commands.sweep_parts import LOGS, add_beginning, add_only, allocation, begun, selection
from refit.commands.sweep_run import held, hold_run, run_id
from refit.errors import ExitCode, UsageError
from refit.launch.base import Launcher
from refit.launch.host import Stop, ThisProcess
from refit.report.refits.sweep_table import sweep_text
from refit.report.terminal.console import show, show_aside
from refit.results.status import Status
from refit.results.sweep import Sweep, attempts
from refit.sweep import run


def add(parts: argparse._SubParsersAction[Any]) -> None:
    """Register both steps."""
    parser = parts.add_parser(
        "submit",
        help="submit a job for each scenario, without waiting (kubernetes)",
        epilog="`refit sweep run --resume RUN_ID` waits for the jobs and collects their results.",
    )
    add_beginning(parser, needs_output=False)
    add_only(parser)
    add_launcher(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the manifests and send nothing; a refused scenario has none"
    )
    parser.set_defaults(run=_submit)

    parser = parts.add_parser(
        "cancel",
        help="end the jobs of a run (kubernetes)",
        epilog="A `refit sweep run` that waits for them sums up and ends.",
    )
    parser.add_argument("run_id", metavar="RUN_ID")
    add_launcher(parser)
    parser.set_defaults(run=_cancel)


def _submit(args: argparse.Namespace) -> int:
    if args.only and not args.resume:
        raise UsageError("--only goes with --resume RUN_ID")
    if args.output_dir is None and not args.dry_run:
        raise UsageError("--output-dir missing: where do logs and results go?")
    host = ThisProcess(Stop())
    launcher = launcher_class(args)(host, environment(args))
    fit(args, launcher)
    if args.dry_run:
        return _dry_run(args, launcher)
    with held(args, host):
        file = begun(args, launcher.brings_nodes)
        sweep = Sweep.read(file)
        pending = run.pending(sweep, file.parent, args.only or "unfinished")
        check_pending(args, launcher, file, pending)
        with contextlib.nullcontext() if args.resume else hold_run(file, "exclusive", host):
            for planned in pending:
                made = attempts(file.parent, sweep.run_id, planned.name)
                if made and launcher.goes_on(made[-1]):
                    show(f"{planned.name}: submitted already")
                    continue
                name = launcher.submit(run.task(sweep, file.parent, planned).job())
                show(f"{planned.name}: {name}")
    show(f"Wait for them with: {goes_on(args, run_id(file))}")
    return 0


def _dry_run(args: argparse.Namespace, launcher: Launcher) -> int:
    """Print what would be sent: for new scenarios as they would be planned, for a run as it stands."""
    directory = ((args.output_dir or Path()) / LOGS).absolute()
    if args.resume is not None:
        sweep = run.find(directory, args.resume)
        ready = run.pending(sweep, directory, args.only or "unfinished")
    else:
        sweep = run.plan(selection(args), allocation(args), args.run_id or "dry-run")
        ready = [planned for planned in sweep.scenarios if planned.status is Status.READY]
    show_aside(sweep_text(sweep))
    text, note = launcher.manifests(sweep.cluster, [run.task(sweep, directory, planned).job() for planned in ready])
    show(text.rstrip("\n"))
    if note:
        show_aside(note)
    refused = any(planned.status is Status.REFUSED for planned in sweep.scenarios)
    return int(ExitCode.USAGE if refused else ExitCode.OK)


def _cancel(args: argparse.Namespace) -> int:
    launcher = launcher_class(args)(ThisProcess(Stop()), environment(args))
    ended = launcher.cancel(args.run_id)
    if not ended:
        raise UsageError(f"run {args.run_id!r} has no jobs in this namespace of the cluster: they have ended")
    for name in ended:
        show(f"deleted {name}")
    return 0
