"""Every refit of a run in order, one panel per scenario."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refit.report.plots.style import (
    LINE,
    Look,
    baseline_look,
    grid,
    legend,
    method_look,
    new_figure,
    ran_title,
    tested_title,
    wrapped,
)
from refit.results.outcomes import Outcome
from refit.results.refit import EngineResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def iterations_figure(outcomes: Sequence[Outcome], under: str) -> Figure:
    """Every refit in order, warm-up refits hollow, the median dashed. `outcomes` have measured refits."""
    columns = min(2, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    figure = new_figure(5.5 * columns + (columns == 1) * 2, 1.7 + 2.1 * rows, "Every refit, slowest rank", under)
    for place, outcome in enumerate(outcomes, 1):
        axes = figure.add_subplot(rows, columns, place)
        if outcome.tested:
            _series(axes, outcome.tested, tested_title(outcome), method_look(outcome.method), "-")
        for name, baseline in outcome.refit.baselines.items():
            doubt = f", {baseline.doubt.lower()}" if baseline.doubt else ""
            _series(axes, baseline, f"{ran_title(outcome, name)}{doubt}", baseline_look(name), ":")
        axes.set_title(wrapped(outcome.planned.name), fontsize=9)
        _scales(axes)
        if place > len(outcomes) - columns:
            axes.set_xlabel("refit (hollow: warm-up)")
    figure.supylabel("slowest rank (ms)", fontsize=10)
    legend(figure)
    return figure


def _series(axes: Axes, engine: EngineResult, name: str, look: Look, line: str) -> None:
    if not engine.measured_s:
        return
    warm_ms, measured_ms = ([1e3 * seconds for seconds in times] for times in (engine.warmup_s, engine.measured_s))
    numbers = range(1, len(warm_ms) + len(measured_ms) + 1)
    start = len(warm_ms)
    axes.plot(numbers, warm_ms + measured_ms, color=LINE, linewidth=1, linestyle=line)
    axes.plot(numbers[:start], warm_ms, look.marker, color=LINE, markerfacecolor="white")
    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 1.2, "markersize": 6.5}
    axes.plot(numbers[start:], measured_ms, look.marker, color=look.marker_color, label=name, **edge)
    axes.axhline(statistics.median(measured_ms), color=LINE, linewidth=0.8, linestyle="--")


def _scales(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid(axes, "both")
