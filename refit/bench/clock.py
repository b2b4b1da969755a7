"""The clock: a common barrier, one refit, the slowest rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from refit.transport.base import Program, RunReport


@dataclass(frozen=True, slots=True)
class Timing:
    """One refit on this rank: seconds from leaving the common barrier until its last byte was usable."""

    seconds: float
    report: RunReport


def time_run(program: Program | None, group: dist.ProcessGroup, device: torch.device) -> Timing:
    """Run `program` once under the clock; idle ranks (None) only keep the barrier.

    Collective over `group`. Work queued before the clock starts is finished first, and the program's own work before
    it stops, so neither leaks into a neighbour's time.
    """
    _synchronize(device)
    dist.barrier(group)
    start = time.perf_counter()
    report = program.run() if program is not None else RunReport()
    _synchronize(device)
    return Timing(time.perf_counter() - start, report)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds spent in named steps of set-up, each added to whatever the step has taken before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
