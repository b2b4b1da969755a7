"""Times one refit on this rank, from a barrier common to all ranks."""

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
    """Run `program` once and time it. Idle ranks pass None and only take part in the barrier.

    Collective: every rank of `group`. The device is synchronised before the barrier and before the clock stops, so
    earlier work is not timed and all of the program's work is.
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
    """Seconds spent in named set-up steps. Repeated steps add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
