"""Times refits and steps on this rank, from a barrier common to all ranks, and parts of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from refit.transport.base import Program, RunReport

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """One refit on this rank: seconds from leaving the common barrier until its last byte was usable."""

    seconds: float
    report: RunReport


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What an action returned on this rank, and its seconds from leaving the common barrier until it was done."""

    seconds: float
    value: T


def timed(action: Callable[[], T], group: dist.ProcessGroup, device: torch.device) -> Timed[T]:
    """Call `action` and time it. Collective: every rank of `group`; idle ranks pass an action that does nothing.

    The device is synchronised before the barrier and before the clock stops, so earlier work is not timed and all of
    the action's work is.
    """
    _synchronize(device)
    dist.barrier(group)
    start = time.perf_counter()
    value = action()
    _synchronize(device)
    return Timed(time.perf_counter() - start, value)


def time_run(program: Program | None, group: dist.ProcessGroup, device: torch.device) -> Timing:
    """Run `program` once and time it. Idle ranks pass None and only take part in the barrier.

    Collective: every rank of `group`.
    """
    found = timed(program.run if program is not None else RunReport, group, device)
    return Timing(found.seconds, found.value)


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


class StartClock:
    """Seconds of each phase of a rank's start, from the start of its process to the end of its first refit.

    A forked rank counts from the start of the process that has imported for it. The clock begins in the phase
    `imports`. A phase that is entered again adds up. After `stop` nothing is counted.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase: str | None = "imports"
        self._since = _PROCESS_START_S

    def enter(self, phase: str) -> None:
        """End the current phase and begin `phase`."""
        self._end(phase)

    def stop(self) -> None:
        """The first refit is done."""
        self._end(None)

    def _end(self, next_phase: str | None) -> None:
        if self._phase is None:
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = next_phase, now


def _process_start_s() -> float:
    """When this process started, on CLOCK_BOOTTIME: field 22 of /proc/self/stat (proc(5)), in clock ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


_PROCESS_START_S = _process_start_s()
"""Forked processes inherit it."""


class Spans:
    """Records named parts of a step, on a GPU with CUDA events, which do not stop the host. Parts may nest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[str, Any] = {}
        self._closed: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """End the part that began last under this name; without one, nothing is recorded."""
        begun = self._open.pop(name, None)
        if begun is not None:
            self._closed.append((name, begun, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far, added up. Synchronises the device."""
        _synchronize(self._device)
        found: dict[str, float] = {}
        for name, begun, ended in self._closed:
            found[name] = found.get(name, 0.0) + self._between(begun, ended)
        return found

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        return float(begun.elapsed_time(ended) / 1e3 if self._device.type == "cuda" else ended - begun)
