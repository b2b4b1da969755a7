"""Plans many scenarios: each pair of layouts is planned once, on all cores where that saves time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from refit.cli.parsing import parse
from refit.errors import RefitError, UsageError
from refit.report.terminal import live

WORTH_A_POOL_S = 1.5
"""Other cores are used where planning the rest on this one would take longer than this. Starting them takes 0.5 s."""

MAX_PROCESSES = 8
"""Each holds plans of its own in memory."""


class HasFlags(Protocol):
    """A scenario, as a command line."""

    @property
    def flags(self) -> tuple[str, ...]: ...


T = TypeVar("T")
C = TypeVar("C", bound=HasFlags)

Group = list[tuple[int, C]]
"""Scenarios of one pair of layouts, with their places in the sweep."""


def plan_all(candidates: Sequence[C], plan: Callable[[C], T]) -> list[T]:
    """`plan` of every candidate, in their order. A terminal shows how many are done.

    `plan` may run in other processes: it is a function of a module, or a partial of one. Raises what it raises, and
    RefitError where such a process is killed.
    """
    planned: dict[int, T] = {}
    for done in _groups_planned(by_layouts(candidates), plan):
        planned.update(done)
        live.draw(f"planned {len(planned)} of {len(candidates)} scenarios")
    return [planned[place] for place in range(len(candidates))]


def by_layouts(candidates: Sequence[C]) -> list[Group[C]]:
    """Candidates with equal models and layouts together. One whose flags are refused is on its own."""
    groups: dict[Hashable, Group[C]] = defaultdict(list)
    for place, candidate in enumerate(candidates):
        groups[_layouts(candidate, place)].append((place, candidate))
    return list(groups.values())


def _layouts(candidate: HasFlags, place: int) -> Hashable:
    try:
        scenario = parse(candidate.flags).scenario
    except UsageError:
        return place
    return place if scenario.model is None else (scenario.model, scenario.source, scenario.destination)


def _groups_planned(groups: list[Group[C]], plan: Callable[[C], T]) -> Iterator[dict[int, T]]:
    """Groups one after another, until the pace so far says that other cores would help with the rest."""
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    start_s = time.perf_counter()
    for number, group in enumerate(groups):
        rest = groups[number:]
        left_s = (time.perf_counter() - start_s) / number * len(rest) if number else 0.0
        if processes > 1 and len(rest) > 1 and left_s > WORTH_A_POOL_S:
            yield from _on_cores(rest, min(processes, len(rest)), plan)
            return
        yield _plan_group(group, plan)


def _on_cores(groups: list[Group[C]], processes: int, plan: Callable[[C], T]) -> Iterator[dict[int, T]]:
    # Not by fork: this process may have threads. The server has imported what is needed before it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(processes, context, initializer=_begin) as pool:
        pending = [pool.submit(_plan_group, group, plan) for group in groups]
        try:
            for done in as_completed(pending):
                yield done.result()
        except BrokenProcessPool:
            raise RefitError(
                "a process that planned scenarios was killed, by the kernel where memory ran out: plan fewer at once, "
                "or with `taskset -c 0` on one core"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Ctrl-C is for the process that waits, which then ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _plan_group(group: Group[C], plan: Callable[[C], T]) -> dict[int, T]:
    return {place: plan(candidate) for place, candidate in group}
