"""PhaseClock: where the main thread's time goes during one run."""

from __future__ import annotations

import time
from collections import defaultdict


class PhaseClock:
    """Adds up seconds by phase name, from its making to the last lap without a gap."""

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the lap before was spent on `phase`."""
        now = time.perf_counter()
        self.phases_s[phase] += now - self._since
        self._since = now
