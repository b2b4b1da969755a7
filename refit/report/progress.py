"""Progress lines: one per refit, but no more than one a second, so that long runs leave readable logs."""

from __future__ import annotations

import time
from collections.abc import Callable

from refit.report.text import iteration_line
from refit.results.result import Sample

MIN_INTERVAL_S = 1.0


class Progress:
    """The lines of one engine's refits. The first, the last and every one with wrong elements are always printed."""

    def __init__(self, engine: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._last_line: float | None = None

    def line(self, sample: Sample, number: int, total: int) -> str:
        """The line for refit `number` of `total` (of the warm-up or of the measured ones), empty where it is left
        out."""
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= MIN_INTERVAL_S
        is_last = not sample.warmup and number == total
        if not (due or is_last or sample.num_wrong):
            return ""
        self._last_line = now
        return iteration_line(self._engine, sample, number, total)
