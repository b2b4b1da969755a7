"""Starts the ranks of one run of a benchmark on this machine, with the launcher of `refit sweep run`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refit.config.registry import LAUNCHERS, load
from refit.errors import CANCELLED
from refit.launch.base import Job, Launcher
from refit.launch.host import Cancelled, Stop, ThisProcess
from refit.launch.rank_logs import keep_rank_logs


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine. A signal that comes while ranks run ends them."""

    launcher: Launcher

    def run(self, flags: Sequence[str], num_ranks: int, log: Path, timeout_s: float | None = None) -> int:
        """Run benchmark_refit.py with `flags` on that many ranks; returns the exit code, 124 where its time was up.

        Its output goes to `log`; the ranks' own logs are kept beside it where it fails. Raises Cancelled.
        """
        log.unlink(missing_ok=True)
        job = Job(1, num_ranks, log.with_suffix(""), tuple(flags))
        seconds = 0 if timeout_s is None else max(1, round(timeout_s))
        code = self.launcher.host.run(self.launcher.command(job), log, seconds)
        keep_rank_logs(job, code)
        return code


@contextmanager
def this_machine() -> Iterator[Machine]:
    """Starts ranks within this context, and ends this process in order on SIGTERM and SIGINT."""
    stop = Stop()
    with stop.on_signals():
        try:
            yield Machine(load(LAUNCHERS["local"].launcher)(ThisProcess(stop), os.environ))
        except Cancelled:
            raise SystemExit(CANCELLED) from None
