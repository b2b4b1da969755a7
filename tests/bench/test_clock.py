"""The clock of a process's start."""

from __future__ import annotations

import subprocess
import sys

from refit.bench.clock import StartClock


def test_phases_follow_each_other_until_the_first_refit() -> None:
    clock = StartClock()
    for phase in ("build", "check", "build", "first refit"):
        clock.enter(phase)
    clock.stop()
    found = dict(clock.seconds)
    clock.enter("fill")
    clock.stop()
    assert list(clock.seconds) == ["imports", "build", "check", "first refit"]
    assert clock.seconds == found


def test_the_first_phase_begins_with_the_process() -> None:
    """A process that waits half a second before it imports the clock has it in `imports`."""
    program = (
        "import time; time.sleep(0.5)\n"
        "from refit.bench.clock import StartClock\n"
        "clock = StartClock(); clock.stop(); print(clock.seconds['imports'])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(shown) > 0.5
