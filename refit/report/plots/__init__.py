"""Pictures of a run, as PNG: one module for each kind, all readable in grey.

matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from refit.report.plots.caption import caption
from refit.report.plots.iterations import iterations_figure
from refit.report.plots.pairs import NoPairs, Pairs, pairs_figure
from refit.report.plots.phases import phases_figure
from refit.report.plots.rank_bytes import rank_bytes_figure
from refit.report.plots.scaling import scaling_figure
from refit.report.plots.shares import shares_figure
from refit.report.plots.steps import crossover_figure, losses_figure
from refit.report.plots.style import check_available, save
from refit.report.plots.times import times_figure
from refit.report.refits.points import points_of
from refit.report.refits.run_spread import by_scenario
from refit.report.refits.scaling import scalings
from refit.report.refits.shares import curves_of
from refit.report.steps.arms import arms_of
from refit.report.steps.dispatchers import pairings
from refit.results.outcomes import Outcome
from refit.results.runs import Run


def draw(run: Run, directory: Path, pairs: Pairs) -> Iterator[Path | str]:
    """Draw every picture that the run's results allow: the path of each, or a line with the reason why it is missing.

    Existing files of these names are replaced. Raises UnavailableError without matplotlib.
    """
    check_available()
    directory.mkdir(parents=True, exist_ok=True)
    yield from _run_pictures(run, directory)
    for scenario in by_scenario(outcome for outcome in run.outcomes if outcome.planned.refits):
        # All runs of a scenario have one plan.
        outcome = next((each for each in scenario.outcomes if each.refit.plan), scenario.outcomes[0])
        yield from _scenario_pictures(scenario.name, outcome, pairs, directory)


def _run_pictures(run: Run, directory: Path) -> Iterator[Path | str]:
    measured = [outcome for outcome in run.outcomes if outcome.tested and outcome.tested.measured_s]
    under = caption(run.outcomes, run.sweep)
    if arms := arms_of(run.outcomes):
        yield save(losses_figure(arms, under), directory / "losses.png")
        if pairs := pairings(run.outcomes):
            yield save(crossover_figure(pairs, under), directory / "crossover.png")
        else:
            yield "no crossover: no two runs differ in the dispatcher alone"
    if not measured:
        yield "no times: no scenario of this run has any"
        return
    refits = [outcome for outcome in run.outcomes if outcome.planned.refits]
    yield save(times_figure(refits, under), directory / "times.png")
    yield save(iterations_figure(measured, under), directory / "iterations.png")
    yield save(phases_figure(measured, under), directory / "phases.png")
    if groups := scalings(points_of(run.outcomes)):
        yield save(scaling_figure(groups, under), directory / "scaling.png")
    else:
        yield "no time against bytes: needs two scenarios of one mode, method and model that are ok"
    if curves := curves_of(run.outcomes):
        yield save(shares_figure(curves, under), directory / "shares.png")
    elif any(outcome.tested and outcome.tested.asked_shares for outcome in measured):
        yield "no time against the share of changed weights: needs two shares"


def _scenario_pictures(name: str, outcome: Outcome, pairs: Pairs, directory: Path) -> Iterator[Path | str]:
    plan = outcome.refit.plan
    if plan is None:
        yield f"{name}: no bytes: {outcome.reason or 'its result has none'}"
        return
    under = caption([outcome])
    try:
        matrix = pairs(outcome)
        picture = pairs_figure(outcome, matrix, under)
    except NoPairs as reason:
        yield save(rank_bytes_figure(outcome, plan, None, under), directory / f"{name}_bytes.png")
        yield f"{name}: no bytes between pairs of ranks: {reason}"
        return
    yield save(rank_bytes_figure(outcome, plan, matrix, under), directory / f"{name}_bytes.png")
    yield save(picture, directory / f"{name}_pairs.png")
