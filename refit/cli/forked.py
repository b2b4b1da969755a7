"""Ranks forked from one process that has imported what they need: `python -m refit.cli.forked PID NUM_RANKS FLAGS`.

Like `refit.cli.torchrun`, it ends with the process PID that started it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from refit.cli import torchrun
from refit.cli.main import main_of
from refit.cli.parsing import parse
from refit.errors import RefitError
from refit.report.terminal.console import show_aside, show_error

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""With 1, torch asks NVML whether there is a GPU. Its own question to CUDA would leave forked processes without one."""


def command(parent: int, num_ranks: int, flags: Sequence[str]) -> list[str]:
    """The command line of this module."""
    return [sys.executable, "-m", "refit.cli.forked", str(parent), str(num_ranks), *flags]


def launch_ranks(parent: int, num_ranks: int, flags: list[str]) -> None:
    """Import what the ranks need, fork them and wait for them. Ranks are spawned where an import uses CUDA."""
    torchrun.end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are ranks, there is nothing to say
    before = dict(os.environ)
    os.environ[NVML_CHECK] = "1"
    from refit.bench.launcher import launch, load_libraries, uses_cuda

    request = parse(flags)
    load_libraries(request.scenario)
    if uses_cuda():
        show_aside("A library used CUDA while it was imported, so ranks are spawned and not forked.")
        spawned = torchrun.command(parent, num_ranks, flags)
        os.execve(spawned[0], spawned, before)
    launcher = os.getpid()

    def run() -> int:
        torchrun.end_with_parent(launcher)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if NVML_CHECK not in before:
            del os.environ[NVML_CHECK]
        sys.argv = [str(Path(__file__).with_name("__main__.py")), *flags]
        return main_of(request)

    launch(num_ranks, run)


if __name__ == "__main__":
    try:
        launch_ranks(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    except RefitError as error:
        show_error(str(error))
        sys.exit(int(error.exit_code))
