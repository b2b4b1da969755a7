"""Progress of one engine's refits: lines for logs, no more than one a second, and what a terminal shows meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

from refit import units
from refit.config.registry import ENGINES
from refit.config.scenario import Scenario
from refit.report.refits.refit_lines import iteration_line
from refit.results.refit import Sample

MIN_INTERVAL_S = 1.0


class Progress:
    """The lines of one engine's refits. The first, the last and every one with wrong elements are always printed."""

    def __init__(self, engine: str, scenario: Scenario, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._num_warmup = scenario.num_warmup
        self._num_iterations = scenario.most_iterations
        self._is_open = scenario.max_iterations is not None
        self._clock = clock
        self._start = clock()
        self._last_line: float | None = None

    def now(self, iteration: int) -> str:
        """`refit 3/5, about 12 s left`: which refit comes next, and the time left if the others take as long.

        Without a time before the first has ended, and where the number of refits is not known.
        """
        warmup = iteration < self._num_warmup
        title = f"{ENGINES[self._engine].title} {'warm-up ' if warmup else ''}{self._number(iteration, warmup)}"
        if self._is_open:
            return f"{title}, until the median is stable"
        left = self._num_warmup + self._num_iterations - iteration
        left_s = (self._clock() - self._start) / iteration * left if iteration else 0.0
        return f"{title}, about {units.duration(left_s)} left" if iteration else title

    def line(self, sample: Sample) -> str:
        """The line for a refit, empty where it is left out. Warm-up and measured refits are numbered apart."""
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= MIN_INTERVAL_S
        is_last = sample.iteration + 1 == self._num_warmup + self._num_iterations
        if not (due or is_last or sample.num_wrong or sample.engine_wrong):
            return ""
        self._last_line = now
        return iteration_line(self._engine, sample, self._number(sample.iteration, sample.warmup))

    def _number(self, iteration: int, warmup: bool) -> str:
        """`3/5`, and `3/5 at most` where refits go on until the median is stable."""
        if warmup:
            return f"{iteration + 1}/{self._num_warmup}"
        most = " at most" if self._is_open else ""
        return f"{iteration + 1 - self._num_warmup}/{self._num_iterations}{most}"
