"""Where the time of a refit goes: a stack of phases per scenario, and another of what comes before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from refit.report.plots.style import PHASE_LOOKS, grid, legend, new_figure, time_scale, wrapped
from refit.report.terminal.escaped import picture_text
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST = {"plan": "plan", "prepare": "prepare", "first": "first refit"}
"""Parts of `EngineResult.cold_s`, as the picture names them."""


def phases_figure(outcomes: Sequence[Outcome], under: str) -> Figure:
    """Left the phases of each scenario's median refit, right connections, plan, prepare and first refit.

    `outcomes` have measured refits. Phases are those of the slowest rank.
    """
    engines = {outcome.planned.name: outcome.tested for outcome in outcomes if outcome.tested}
    ways = {outcome.planned.name: picture_text(outcome.method) for outcome in outcomes}
    names = list(engines)
    labels = [wrapped(name if name.endswith(ways[name]) else f"{name} over {ways[name]}") for name in names]
    row = 0.15 * max(2, *(1 + label.count("\n") for label in labels)) + 0.12
    figure = new_figure(12, 2.2 + row * len(engines), "Where the time goes", under)
    left, right = figure.subplots(1, 2, sharey=True)
    _stacks(left, {name: phases_s(median_sample(engine)) for name, engine in engines.items()})
    _stacks(right, {name: before_s(engine) for name, engine in engines.items()})
    left.set_yticks(range(len(names)), labels, fontsize=9)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_title("the refit of median time, phases of its slowest rank", fontsize=9)
    right.set_title("once per process, and the first refit", fontsize=9)
    legend(figure, "outside lower left", [left])
    legend(figure, "outside lower right", [right])
    return figure


def median_sample(engine: EngineResult) -> Sample:
    """The measured refit whose time is closest to the median."""
    measured = [sample for sample in engine.samples if not sample.warmup]
    median_s = engine.median_s or 0.0
    return min(measured, key=lambda sample: abs(sample.seconds - median_s))


def phases_s(sample: Sample) -> dict[str, float]:
    """Seconds of each phase; with `rest`, the time outside all phases, they add up to the refit's."""
    return {**sample.phases_s, "rest": sample.unattributed_s}


def before_s(engine: EngineResult) -> dict[str, float]:
    """Seconds of connections, plan, preparing and the first refit; what was not recorded is left out."""
    connections = {"connections": engine.connect_s} if engine.connect_s is not None else {}
    return {**connections, **{FIRST.get(name, name): seconds for name, seconds in engine.cold_s.items()}}


def _stacks(axes: Axes, stacks: Mapping[str, Mapping[str, float]]) -> None:
    phases = list(dict.fromkeys(phase for stack in stacks.values() for phase in stack))
    looks = {phase: PHASE_LOOKS[number % len(PHASE_LOOKS)] for number, phase in enumerate(phases)}
    longest_s = max((sum(stack.values()) for stack in stacks.values()), default=0.0)
    scale, unit = time_scale(longest_s)
    for row, stack in enumerate(stacks.values()):
        start = 0.0
        for phase, seconds in stack.items():
            axes.barh(row, scale * seconds, left=start, height=0.6, label=picture_text(phase), **looks[phase].fill)
            start += scale * seconds
        if not stack:
            continue
        axes.annotate(f"{start:.3g}", (start, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.12 * scale * longest_s or 1.0)
    axes.set_xlabel(unit)
    grid(axes, "x")
