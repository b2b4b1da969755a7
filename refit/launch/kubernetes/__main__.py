"""What `srun` is to Slurm: submits the pods of one attempt, or finds those that an earlier call has left, and waits.

Its output is the attempt's log, its exit code that of the ranks, TIMED_OUT, DISRUPTED or CUT_SHORT.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from refit.errors import CANCELLED, RefitError
from refit.launch.base import Job
from refit.launch.host import CUT_SHORT
from refit.launch.kubernetes.api import Api, Away
from refit.launch.kubernetes.follow import Limits, follow
from refit.launch.kubernetes.kinds import kind_of
from refit.launch.kubernetes.submit import Submitted, create, pod_run
from refit.launch.kubernetes.values import load_values
from refit.report.terminal.console import show, show_error
from refit.results.sweep import Attempt


class _Told(BaseException):
    """A signal has told this process to stop."""


def words(python: str, values: Path, kind: str, job: Job) -> list[str]:
    """The command line of this module for an attempt."""
    own = [python, "-m", "refit.launch.kubernetes", f"--values={values}", f"--kind={kind}", f"--run-id={job.run_id}"]
    own += [f"--nodes={job.nodes}", f"--ranks-per-node={job.ranks_per_node}", f"--stem={job.stem}"]
    return [*own, f"--timeout={job.timeout_s}", "--", *job.flags]


def main(arguments: Sequence[str]) -> int:
    """Run one attempt. Raises RefitError."""
    parser = argparse.ArgumentParser(prog="refit.launch.kubernetes", allow_abbrev=False)
    for name in ("values", "stem"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("kind", "run-id"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("nodes", "ranks-per-node", "timeout"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    values, kind = load_values(args.values), kind_of(args.kind)
    job = Job(args.nodes, args.ranks_per_node, args.stem, tuple(args.flags), args.run_id, args.timeout)
    attempt, api = Attempt(job.stem), Api(values)
    submitted = Submitted.read(attempt.log)
    if submitted is None:
        run = pod_run(job, values)
        try:
            submitted = create(api, kind, values, run)
        except _Told:
            api.delete_job(kind, run.name)
            api.delete_beside(run.name)
            raise
        show(str(submitted))
    else:
        show(f"# going on with {submitted.kind.name} {submitted.name}")
    return follow(api, values, submitted, job.nodes, attempt, Limits(values.pending_timeout_s, job.timeout_s))


def _stop(*_: object) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise _Told


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except _Told:
        sys.exit(CANCELLED)
    except Away as error:
        show_error(str(error))
        sys.exit(CUT_SHORT)
    except RefitError as error:
        show_error(str(error))
        sys.exit(int(error.exit_code))
