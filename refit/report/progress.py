"""Progress lines: one per refit, but no more than one a second, so that long runs leave readable logs."""

from __future__ import annotations

import time
from collections.abc import Callable

from refit.report.refit_lines import iteration_line
from refit.results.refit import Sample

MIN_INTERVAL_S = 1.0


class Progress:
    """The lines of one engine's refits. The first, the last and every one with wrong elements are always printed."""

    def __init__(
        self, engine: str, num_warmup: int, num_iterations: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._num_warmup = num_warmup
        self._num_iterations = num_iterations
        self._clock = clock
        self._last_line: float | None = None

    def line(self, sample: Sample) -> str:
        """The line for a refit, empty where it is left out. Warm-up and measured refits are numbered apart."""
        number = sample.iteration + 1 - (0 if sample.warmup else self._num_warmup)
        total = self._num_warmup if sample.warmup else self._num_iterations
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= MIN_INTERVAL_S
        is_last = not sample.warmup and number == total
        if not (due or is_last or sample.num_wrong):
            return ""
        self._last_line = now
        return iteration_line(self._engine, sample, number, total)
