"""Many scenarios: each pair of layouts planned once, in order, on one core or several."""

from __future__ import annotations

import functools
import os

import pytest

from refit.errors import RefitError, UsageError
from refit.predict import dry_run
from refit.predict.dry_run import DryRunOptions
from refit.sweep import parallel
from refit.sweep.check import check
from refit.sweep.parallel import by_layouts, plan_all
from refit.sweep.selection import Candidate, select_file, select_lines

LINES = [
    "2:1:1:1:non-collocated:shm:a",
    "1:2:1:1:non-collocated:shm:b",
    "2:1:1:1:non-collocated:gloo:c",
    "3:1:1:1:non-collocated:gloo:refused",
]
PLAN = functools.partial(check, options=DryRunOptions())


def candidates() -> tuple[Candidate, ...]:
    return select_lines(LINES, ["--model", "tiny"]).candidates


def test_scenarios_of_equal_layouts_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    real = dry_run.plan_sides
    monkeypatch.setattr(dry_run, "plan_sides", lambda *sides: plans.append(sides) or real(*sides))
    dry_run._planned.cache_clear()
    found = plan_all(candidates(), PLAN)
    assert [planned.name for planned in found] == ["a", "b", "c", "refused"]
    assert [planned.status.value for planned in found] == ["ready", "ready", "ready", "refused"]
    assert len(plans) == 2
    assert [[place for place, _ in group] for group in by_layouts(candidates())] == [[0, 2], [1], [3]]


def cores_used(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> list[int]:
    """The processes that plan where there are that many cores and planning is worth a pool."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setattr(parallel, "WORTH_A_POOL_S", 0.0)
    return plan_all(select_file("tiny", []).candidates, process_of)


def process_of(candidate: Candidate) -> int:
    return os.getpid()


def test_one_core_plans_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(cores_used(monkeypatch, 1)) == {os.getpid()}


def test_a_short_sweep_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "WORTH_A_POOL_S", 100.0)  # short also on a machine that stands still for a while
    assert set(plan_all(candidates(), process_of)) == {os.getpid()}


def test_several_cores_give_the_same_plans_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plan_all(candidates(), PLAN)
    assert len(set(cores_used(monkeypatch, 2))) > 1
    assert plan_all(candidates(), PLAN) == alone


def refuse(candidate: Candidate, parent: int) -> None:
    if os.getpid() != parent:
        raise UsageError(f"no {candidate.name}")


def die(candidate: Candidate, parent: int) -> None:
    if os.getpid() != parent:
        os._exit(9)


def test_errors_of_other_processes_are_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(parallel, "WORTH_A_POOL_S", 0.0)
    with pytest.raises(UsageError, match=r"no (b|refused)"):
        plan_all(candidates(), functools.partial(refuse, parent=os.getpid()))
    with pytest.raises(RefitError, match="was killed"):
        plan_all(candidates(), functools.partial(die, parent=os.getpid()))
