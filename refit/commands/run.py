"""`refit run`: a scenario on the ranks of this machine, forked from one process or started with torchrun."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from refit.cli import flag_types, forked, torchrun
from refit.cli.flag_parser import FlagParser
from refit.cli.invocation import command_text
from refit.cli.main import main
from refit.cli.output import discard_partial
from refit.cli.parsing import parse
from refit.config.limits import MAX_NAME
from refit.config.scenario import Scenario, check_num_ranks
from refit.errors import CANCELLED as STOPPED
from refit.errors import ExitCode
from refit.predict import cpus
from refit.predict.dry_run import DryRunOptions
from refit.report.refits.headline import headlines
from refit.report.terminal import live
from refit.report.terminal.console import show_aside
from refit.results.result import CANCELLED, Failure, Result, ResultFile, default_name, now
from refit.results.runs import outcome_of
from refit.results.status import Status
from refit.sweep import check
from refit.sweep.close import NOTICED, Cause, killed_text, phase_of, root_cause, telling_line, tells_more

STARTS = {"fork": (forked.command, cpus.FORKED), "spawn": (torchrun.command, cpus.SPAWNED)}
"""Ways of starting ranks: from one process that has imported for all, or each on its own, by torchrun. The launcher's
command line, and what such ranks need on CPUs."""

KEPT_LINES = 500
"""The end of the ranks' stderr, where their launcher reports which rank failed first."""

LAUNCHER_ERRORS = ("ChildFailedError", "SignalException")
"""What launchers end with where a rank has failed, and where torchrun was told to stop."""

AGENT_PREFIXES = ("W", "E", "I")
"""What lines of torchrun's own log begin with, before the date: `W1121 13:00:07.440000 22955 torch/...`."""


def add(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "run",
        usage="refit run [--nproc-per-node N] [--start fork|spawn] FLAGS",
        help="run a scenario on this machine",
        description="Start one rank per GPU that the scenario needs (CPU ranks for gloo and shm), or N ranks of which "
        "some stay idle, and run it. They are forked from one process, which imports PyTorch and Megatron-Core for "
        "all; with --start spawn torchrun starts each on its own, as PET_* variables say. "
        "`refit run --help` lists the flags of benchmark_refit.py.",
        epilog="example:\n  refit run --model tiny --refit-method gloo --rl-inference-tensor-model-parallel-size 2",
    )
    parser.set_defaults(run=run, takes_flags=True)


def run(args: argparse.Namespace) -> int:
    """Run the scenario and return its exit code, not torchrun's. Raises UsageError before anything is started."""
    live.draw("checking the scenario")
    own, flags = own_flags().parse_known_args(args.flags)
    request = parse(flags)
    if request.dry_run is not None:
        return main(flags)
    num_ranks = own.nproc_per_node or request.scenario.num_ranks
    started = ["--start", own.start] if own.start != "fork" else []
    again = command_text(["run", *started, *flags])
    check_num_ranks(request.scenario, num_ranks, f"start {request.scenario.num_ranks} ranks: {again}")
    command, start = STARTS[own.start]
    if cpus.is_on_cpus(request.scenario):
        check.checked(flags, DryRunOptions(), cpus.this_machine(), start)
    flags, own_result = _with_own_result(flags, request.scenario)
    log: deque[str] = deque(maxlen=KEPT_LINES)
    # On a terminal rank 0 draws over this line as soon as it runs.
    rank_0_draws = live.is_terminal(sys.stdout)
    live.draw(f"{'starting' if rank_0_draws else 'running'} {num_ranks} ranks", ticking=not rank_0_draws)
    # In a session of its own: a signal reaches the ranks once, through torchrun.
    process = subprocess.Popen(
        command(os.getpid(), num_ranks, flags),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={"OMP_NUM_THREADS": "1", **os.environ},
        start_new_session=True,
    )
    with _signals_forwarded(process) as received:
        assert process.stderr is not None
        verdict = ""
        for line in without_launcher(_kept(process.stderr, log)):
            live.clear(others=True)
            if NOTICED.match(line):
                verdict = verdict or line  # which signal it was comes with the launcher's report
            else:
                show_aside(line)
        code = process.wait()
    live.clear(others=True)
    cause = root_cause(list(log), code)
    if code != 0 and (received or _exit_code(cause, code) is not ExitCode.USAGE):
        discard_partial(request.scenario)  # ranks that were killed could not
    if received and code != 0:
        return _cancelled(own_result, request.scenario)
    show_killed(verdict, cause)
    exit_code = _exit_code(cause, code)
    if own_result is not None and exit_code not in (ExitCode.OK, ExitCode.WRONG_DATA, ExitCode.USAGE):
        _complete(own_result, request.scenario, cause, exit_code, list(log))
    return int(exit_code)


def _cancelled(file: ResultFile | None, scenario: Scenario) -> int:
    """Record and show what was measured before a signal came. Returns the exit code."""
    if file is None or not file.path.exists():
        show_aside(CANCELLED if file is None else f"{CANCELLED} before the ranks had met, nothing was measured")
        return STOPPED
    result = file.read()
    result = replace(result, scenario=result.scenario or scenario)
    if result.status in (Status.RUNNING, Status.FAILED):
        result = replace(
            result, status=Status.FAILED, exit_code=int(ExitCode.FAILED), failure=Failure(CANCELLED), finished=now()
        )
        file.write(result)
    outcome = outcome_of(file.run_id, result)
    for line in headlines(outcome):
        show_aside(line)
    return STOPPED


def show_killed(verdict: str, cause: Cause) -> None:
    """Say once that a signal ended a rank: what the ranks noticed of it, and what only their launcher knows."""
    told = NOTICED.match(verdict)
    if text := killed_text(cause):
        phase = f" in phase '{told['phase']}'" if told and int(told["rank"]) == cause.rank else ""
        show_aside(f"FAILED: rank {cause.rank} failed{phase}: {text}")
    elif verdict:
        show_aside(verdict)


def _with_own_result(flags: list[str], scenario: Scenario) -> tuple[list[str], ResultFile | None]:
    """`flags` with a name for the result, and the file that it will have; None where the name that was given is taken.

    Named here and not by the ranks, so that it can be completed where they cannot.
    """
    if scenario.run_name is not None:
        path = scenario.output_dir / f"{scenario.run_name}.json"
        return flags, None if path.exists() else ResultFile(path)
    name = re.sub(r"[^A-Za-z0-9_.+=-]", "_", default_name(scenario))[: MAX_NAME - len("-999")]
    stem, number = name, 1
    while (path := scenario.output_dir / f"{stem}.json").exists():
        stem, number = f"{name}-{number}", number + 1
    return [*flags, f"--run-name={stem}"], ResultFile(path)


def _complete(file: ResultFile, scenario: Scenario, cause: Cause, code: ExitCode, log: Sequence[str]) -> None:
    """Put into the result what the ranks could not: their scenario, how they ended, a signal that ended one of them."""
    result = file.read() if file.path.exists() else Result(file.run_id, scenario=scenario)
    if result.status is Status.RUNNING:
        status = Status.WAIVED if code is ExitCode.WAIVED else Status.FAILED
        message = killed_text(cause) or telling_line(list(without_launcher(iter(log))))
        failure = Failure(message, None if status is Status.WAIVED else cause.rank)
        result = replace(result, status=status, exit_code=int(status.exit_code), failure=failure, finished=now())
    elif result.failure is not None and tells_more(cause, result):
        failure = Failure(killed_text(cause), cause.rank, phase_of(cause, result))
        result = replace(result, failure=failure)
    file.path.parent.mkdir(parents=True, exist_ok=True)
    file.write(result)


def own_flags() -> FlagParser:
    """The flags that the ranks do not get."""
    parser = FlagParser(add_help=False)
    parser.add_argument("--nproc-per-node", type=flag_types.positive)
    parser.add_argument("--start", choices=sorted(STARTS), default="fork")
    return parser


def without_launcher(lines: Iterable[str]) -> Iterator[str]:
    """The lines of the ranks, without torchrun's log and its report of a failed rank: the ranks have said it better."""
    traceback: list[str] = []
    for line in lines:
        if traceback:
            traceback.append(line)
            if line and not line.startswith((" ", "Traceback")):  # the exception that ends it
                if any(name in line for name in LAUNCHER_ERRORS):
                    break
                yield from traceback
                traceback = []
        elif line.startswith("Traceback (most recent call last)"):
            traceback = [line]
        elif not _is_agents(line):
            yield line
    else:
        yield from traceback
    for _ in lines:
        pass


def _is_agents(line: str) -> bool:
    return line[:1] in AGENT_PREFIXES and line[1:5].isdigit() and "] " in f"{line} " and "torch/" in line


def _kept(lines: Iterable[str], log: deque[str]) -> Iterator[str]:
    for line in lines:
        log.append(line.rstrip("\n"))
        yield log[-1]


@contextmanager
def _signals_forwarded(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Have the launcher end its ranks on SIGINT and SIGTERM, and go on waiting for it. Yields those received.

    The launcher gets SIGTERM for both: what Python does on SIGINT is a traceback of every process.
    """
    received: list[int] = []

    def take(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(cause: Cause, code: int) -> ExitCode:
    """torchrun ends with 1 whatever its ranks ended with, and without a report of them where it was told to stop."""
    if code == 0:
        return ExitCode.OK
    return ExitCode(cause.exit_code) if cause.rank is not None and cause.exit_code in set(ExitCode) else ExitCode.FAILED
