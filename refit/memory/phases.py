"""PhaseClock: the main thread's time of one run, by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_APART: dict[str, float] = defaultdict(float)
"""Seconds since the last lap that belong to phases of their own."""


class PhaseClock:
    """Adds up seconds by phase name. The phases cover the time from construction to the last lap without gaps."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = defaultdict(float)
        _APART.clear()
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the previous lap as `phase`, except for what `counted_apart` has counted."""
        now = time.perf_counter()
        self.phases_s[phase] += now - self._since - sum(_APART.values())
        for name, seconds in _APART.items():
            self.phases_s[name] += seconds
        _APART.clear()
        self._since = now


def count_apart(phase: str, seconds: float) -> None:
    """Count seconds of the present lap as `phase`, whatever the phase around it."""
    _APART[phase] += seconds


@contextmanager
def counted_apart(phase: str) -> Iterator[None]:
    """Count the time of this context as `phase`, whatever the phase around it. For hooks, which know no clock."""
    begin = time.perf_counter()
    yield
    count_apart(phase, time.perf_counter() - begin)
