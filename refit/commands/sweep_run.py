"""`refit sweep run` and the steps of job arrays: they start the scenarios of a sweep, one after another."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refit.cli import flag_types
from refit.cli.invocation import command_text
from refit.commands.launching import (
    add_launcher,
    check_pending,
    environment,
    fit,
    launcher_class,
    launcher_words,
)
from refit.commands.sweep_parts import LOGS, add_beginning, add_only, begun, sum_up
from refit.errors import CANCELLED, RefitError, UsageError
from refit.launch.host import Cancelled, Host, Script, Stop, ThisProcess
from refit.report.terminal.console import show, show_aside
from refit.results.sweep import SWEEP_SUFFIX, Sweep, sweep_file
from refit.sweep import run
from refit.sweep.lock import hold
from refit.sweep.loop import Loop, name_of_task

LINES = "A line of each scenario and its outcome are printed, then the summary."


def add(parts: argparse._SubParsersAction[Any]) -> None:
    """Register the steps."""
    parser = parts.add_parser(
        "run",
        help="run a list of scenarios one after another, or what an earlier run has left",
        description=f"Check the scenarios, run each in turn with a log and a result of its own, and sum up. {LINES}",
        epilog="A run that is interrupted goes on with --resume RUN_ID. Exit codes as of `end`; 143: interrupted.",
    )
    add_beginning(parser)
    add_only(parser)
    _add_launching(parser)
    parser.set_defaults(run=_run)

    parser = parts.add_parser("task", description="Run one scenario of a sweep, as a job of an array does.")
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    parser.add_argument("number", type=flag_types.non_negative, metavar="NUMBER", help="that of the job")
    parser.add_argument("names", nargs="+", metavar="NAME", help="the scenarios of the array")
    add_only(parser)
    _add_launching(parser)
    parser.set_defaults(run=_task, cpu_fallback=False)

    parser = parts.add_parser("add-job", description="Say in a sweep's file that a Slurm job runs it too.")
    parser.add_argument("sweep_file", type=Path, metavar="SWEEP_FILE")
    parser.add_argument("job", metavar="ID")
    parser.set_defaults(run=_add_job)


def _add_launching(parser: argparse.ArgumentParser) -> None:
    add_launcher(parser)
    parser.add_argument(
        "--timeout",
        type=flag_types.non_negative,
        metavar="S",
        help="longest time of a scenario, in seconds; default: no limit",
    )
    parser.add_argument("--again", help=argparse.SUPPRESS)  # the script: its own command line, for what goes on
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)  # the script, for what runs outside


def _run(args: argparse.Namespace) -> int:
    if args.only and not args.resume:
        raise UsageError("--only goes with --resume RUN_ID")
    kind = launcher_class(args)  # before anything is written

    def work(stop: Stop, host: Host) -> int:
        launcher = kind(host, environment(args))
        fit(args, launcher)
        with held(args, host), contextlib.ExitStack() as locks:
            file = begun(args, launcher.brings_nodes)
            if not args.resume:
                locks.enter_context(hold_run(file, "exclusive", host))
            loop = Loop(file, launcher, stop, args.timeout or 0, args.cpu_fallback)
            pending = loop.pending(args.only or "unfinished")
            check_pending(args, launcher, file, pending)
            try:
                loop.run(pending)
            except Cancelled:
                with contextlib.suppress(RefitError, OSError):
                    sum_up(file)
                show_aside(f"Go on with: {_again(args, file)}")
                raise
            return sum_up(file)

    return _stoppable(work, args, args.output_dir / LOGS)


def _again(args: argparse.Namespace, file: Path) -> str:
    """The command that goes on with a run that was interrupted."""
    goes_on = ["--resume", run_id(file)]
    if args.again is not None:  # a script has called
        return f"{args.again} {shlex.join(goes_on)}"
    words = ["sweep", "run", *goes_on, "--output-dir", str(args.output_dir)]
    words += launcher_words(args)
    words += ["--timeout", str(args.timeout)] if args.timeout else []
    words += ["--cpu-fallback"] if args.cpu_fallback else []
    words += ["--only", args.only] if args.only else []
    return command_text(words)


def _task(args: argparse.Namespace) -> int:
    name, file, kind = name_of_task(args.names, args.number), args.sweep_file, launcher_class(args)
    own = file.with_name(f"{run_id(file)}_{name}.lock")

    def work(stop: Stop, host: Host) -> int:
        what = f"scenario {name} of run {run_id(file)}"
        with hold_run(file, "shared", host), hold(what, "exclusive", own, host):
            loop = Loop(file, kind(host, environment(args)), stop, args.timeout or 0, args.cpu_fallback)
            return loop.run(loop.pending(args.only or "unfinished", name))

    return _stoppable(work, args, file.parent)


def _stoppable(work: Callable[[Stop, Host], int], args: argparse.Namespace, logs: Path) -> int:
    """Do the work; a signal ends it in order, with the exit code CANCELLED."""
    stop = Stop()
    with stop.on_signals():
        try:
            return work(stop, Script(logs.absolute()) if args.ask else ThisProcess(stop))
        except Cancelled:
            return CANCELLED


def run_id(file: Path) -> str:
    """The run that a sweep file is of."""
    return file.name.removesuffix(SWEEP_SUFFIX)


def held(args: argparse.Namespace, host: Host) -> contextlib.AbstractContextManager[None]:
    """The lock of the run that `--resume` names, before its sweep file is written over."""
    file = args.resume and sweep_file((args.output_dir / LOGS).absolute(), args.resume)
    return hold_run(file, "exclusive", host) if file and file.exists() else contextlib.nullcontext()


def hold_run(file: Path, kind: Any, host: Host) -> contextlib.AbstractContextManager[None]:
    return hold(f"run {run_id(file)}", kind, file.with_suffix(".lock"), host)


def _add_job(args: argparse.Namespace) -> int:
    show(str(run.add_job(Sweep.read(args.sweep_file), args.sweep_file.absolute().parent, args.job)))
    return 0
