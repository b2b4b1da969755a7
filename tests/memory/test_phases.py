"""Phases add up to the time between laps, also where a hook counts some of it under a name of its own."""

from __future__ import annotations

import pytest

from refit.memory import phases
from refit.memory.phases import PhaseClock, counted_apart


def test_what_is_counted_apart_is_missing_in_the_phase_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 5.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(times))
    clock = PhaseClock()
    with counted_apart("quantise"):  # from 2 to 5
        pass
    clock.lap("put")  # at 6
    clock.lap("wait")  # at 10
    assert clock.phases_s == {"put": 3.0, "quantise": 3.0, "wait": 4.0}
    assert sum(clock.phases_s.values()) == 10.0


def test_time_before_a_clock_starts_is_not_its_own() -> None:
    with counted_apart("quantise"):
        pass
    clock = PhaseClock()
    clock.lap("put")
    assert set(clock.phases_s) == {"put"}
