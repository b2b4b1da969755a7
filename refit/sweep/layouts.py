"""Layouts of runs that ended before their result held them, read again from the recorded command."""

from __future__ import annotations

from dataclasses import replace

from refit.errors import RefitError
from refit.results.runs import Run
from refit.results.sweep import Planned
from refit.sweep.check import outline
from refit.sweep.selection import Candidate


def with_layouts(run: Run) -> Run:
    """`run`, with the layouts, mode and method that the flags give wherever it has none.

    A scenario without flags, or with flags that are refused here, stays as it is.
    """
    outcomes = tuple(replace(outcome, planned=_with_layouts(outcome.planned)) for outcome in run.outcomes)
    scenarios = tuple(_with_layouts(planned) for planned in run.sweep.scenarios)
    return replace(run, outcomes=outcomes, sweep=replace(run.sweep, scenarios=scenarios))


def _with_layouts(planned: Planned) -> Planned:
    if planned.source is not None or not planned.flags:
        return planned
    try:
        found = outline(Candidate(planned.name, planned.flags), max(planned.ranks_per_node, 1))
    except RefitError:
        return planned
    if found.source is None:
        return planned
    return replace(
        planned,
        source=found.source,
        destination=found.destination,
        mode=found.mode,
        method=found.method,
        num_ranks=found.num_ranks,
    )
