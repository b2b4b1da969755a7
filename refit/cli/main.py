"""The entry point of benchmark_refit.py: runs a dry run or a benchmark and returns the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from refit.cli.launch import check_launch, rank_variables
from refit.cli.output import check_output
from refit.cli.parsing import Request, parse
from refit.errors import RefitError, UsageError
from refit.predict.dry_run import dry_run
from refit.predict.memory import check_memory
from refit.report.plans.dry_run import dry_run_text
from refit.report.plans.dry_run_json import dry_run_json
from refit.report.terminal import live
from refit.report.terminal.console import ending_quietly, show, show_error, show_text


def main(argv: Sequence[str]) -> int:
    """Run the command line and return this process's exit code, that of a closed pipe included."""
    return ending_quietly(lambda: _main(lambda: parse(argv), argv))


def main_of(request: Request) -> int:
    """What `main` does with this process's command line, parsed."""
    return ending_quietly(lambda: _main(lambda: request, sys.argv[1:]))


def _main(request: Callable[[], Request], words: Sequence[str]) -> int:
    """Run the request and return this process's exit code. Errors meant for the user are printed once.

    Errors common to all ranks exit non-zero on rank 0 only, so that a launcher reports one failure.
    """
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        code = _run(request(), first, words)
    except UsageError as error:
        if first:
            show_error(str(error))
        code = int(error.exit_code)
    except RefitError as error:  # may concern this node only: print it here and end the job
        if os.environ.get("LOCAL_RANK", "0") == "0":
            show_error(str(error))
        return int(error.exit_code)
    return code if first else 0


def _run(request: Request, first: bool, words: Sequence[str]) -> int:
    if request.dry_run is not None:
        if first:
            live.draw("planning")
            planned = dry_run(request.scenario, request.dry_run)
            if request.as_json:
                show(dry_run_json(planned))
            else:
                show_text(dry_run_text(planned))
            check_memory(planned)
        return 0
    os.environ.update(rank_variables(os.environ))
    check_launch(request.scenario, os.environ, request.gpus_per_node, words)
    check_output(request.scenario, os.environ)
    if first:
        live.draw("loading PyTorch and Megatron-Core")
    # Imported here: a dry run needs neither torch nor Megatron.
    from refit.bench.runner import run

    try:
        return run(request.scenario)
    except BrokenPipeError as error:  # a connection between ranks, not the pipe of the output
        raise RefitError(f"a connection to another rank or to the output was closed: {error}") from error
