"""Training steps as pictures: loss curves, and the mean step over micro-batches, where dispatchers cross over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from refit.report.plots.style import METHOD_LOOKS, grid, legend, new_figure, wrapped_text
from refit.report.steps.arms import Arm
from refit.report.steps.dispatchers import Pairing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_WIDTH = 24
"""Characters of a line in the legend, so that three labels fit beside each other."""


def losses_figure(arms: Sequence[Arm], under: str) -> Figure:
    """The loss of every step of every run. Runs of one scenario look alike."""
    figure = new_figure(8, 4.8, "Loss of every training step", under)
    axes = figure.add_subplot()
    for number, arm in enumerate(arms):
        look = METHOD_LOOKS[number % len(METHOD_LOOKS)]
        for run in arm.runs:
            losses, name = run.result.losses, wrapped_text(arm.repeated.name, LABEL_WIDTH)
            axes.plot(range(1, len(losses) + 1), losses, look.marker, linestyle="-", color=look.color, label=name)
    axes.set_xlabel("step, warm-up included")
    axes.set_ylabel("loss")
    grid(axes, "both")
    legend(figure)
    return figure


def crossover_figure(pairs: Sequence[Pairing], under: str) -> Figure:
    """The mean step of each dispatcher over micro-batches, by layout, with and without overlap.

    Of several runs, the median of their means, with a line from the fastest to the slowest.
    """
    series: dict[str, dict[int, Arm]] = defaultdict(dict)
    arms = [arm for pair in pairs for arm in (pair.first, pair.second)]
    for arm in arms:
        overlap = ", overlap" if arm.steps.dispatch.overlap else ""
        series[f"{arm.where}, {arm.name}{overlap}"][arm.steps.micro_batch_size] = arm
    figure = new_figure(8, 4.8, "Mean training step by micro-batch, slowest rank", under)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(sorted(series.items())):
        look = METHOD_LOOKS[number % len(METHOD_LOOKS)]
        sizes, label = sorted(points), wrapped_text(name, LABEL_WIDTH)
        means_ms = [1e3 * points[size].mean_s for size in sizes]
        axes.plot(sizes, means_ms, look.marker, linestyle="-", color=look.color, label=label)
        for size in sizes:
            if points[size].repeated.has_runs:
                runs_ms = [1e3 * mean for mean in points[size].means_s]
                axes.vlines(size, min(runs_ms), max(runs_ms), color=look.color)
    axes.set_xticks(sorted({arm.steps.micro_batch_size for arm in arms}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences of a micro-batch")
    axes.set_ylabel("mean step (ms)")
    grid(axes, "both")
    legend(figure)
    return figure
