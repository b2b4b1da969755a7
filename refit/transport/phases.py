"""PhaseClock: the main thread's time of one run, by phase."""

from __future__ import annotations

import time
from collections import defaultdict


class PhaseClock:
    """Adds up seconds by phase name. The phases cover the time from construction to the last lap without gaps."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the previous lap as `phase`."""
        now = time.perf_counter()
        self.phases_s[phase] += now - self._since
        self._since = now
