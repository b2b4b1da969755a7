"""torchrun, ended by the kernel as soon as the process that started it is gone: `python -m refit.cli.torchrun PID ...`.

A process that is killed with SIGKILL can pass no signal on, and would leave its ranks behind.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""Of `prctl(2)`, Linux only: the signal that a process gets when its parent ends."""


def command(parent: int, num_ranks: int, flags: Sequence[str]) -> list[str]:
    """The command line of this module, for ranks of benchmark_refit.py on this machine."""
    own = [sys.executable, "-m", "refit.cli.torchrun", str(parent), "--standalone", "--local-addr", "localhost"]
    return [*own, "--nproc-per-node", str(num_ranks), "-m", "refit.cli", *flags]


def end_with_parent(parent: int) -> None:
    """Have this process get SIGTERM when `parent` ends; exit where it has ended already. Does nothing but on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run torchrun with the arguments that follow PID. It hands SIGTERM on to its ranks."""
    end_with_parent(int(sys.argv.pop(1)))
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
