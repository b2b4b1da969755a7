"""How long a rank may be silent. What the watchdog does with one that is gone: tests/ranks/test_torchrun.py."""

from __future__ import annotations

import os

import pytest

from refit.bench.watchdog import SILENCE_S, silence_s


@pytest.mark.parametrize(("ranks", "cores", "expected_s"), [(1, 2, SILENCE_S), (16, 2, SILENCE_S), (64, 2, 60.0)])
def test_ranks_that_crowd_the_cores_may_be_silent_for_longer(
    ranks: int, cores: int, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert silence_s() == expected_s
