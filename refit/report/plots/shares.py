"""Time and bytes of refits that send changes, against the share of the weights that had changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refit.report.plots.style import LINE, METHOD_LOOKS, Look, grid, legend, new_figure, time_scale, wrapped_text
from refit.report.refits.shares import Curve
from refit.report.terminal.escaped import picture_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_WIDTH = 60


def shares_figure(curves: Sequence[Curve], under: str) -> Figure:
    """Two panels: medians with those of full refits dashed and the crossover dotted, and bytes as a share of full."""
    title = "Changes sent, by the share of the weights that had changed"
    figure = new_figure(11, 5.2 + 0.25 * len(curves), title, under)
    times, sizes = figure.subplots(1, 2)
    longest_s = max(max(curve.full_s or 0.0, *(point.median_s for point in curve.points)) for curve in curves)
    scale, unit = time_scale(longest_s)
    for number, curve in enumerate(curves):
        look = METHOD_LOOKS[number % len(METHOD_LOOKS)]
        shares = [100 * point.share for point in curve.points]
        label = wrapped_text(f"{curve.title}: {curve.verdict}", LABEL_WIDTH)
        _line(times, shares, [scale * point.median_s for point in curve.points], look, label)
        if curve.full_s is not None:
            times.axhline(scale * curve.full_s, color=look.color, linewidth=1.2, linestyle="--", label="full refit")
        if curve.crossover is not None:
            times.axvline(100 * curve.crossover, color=LINE, linewidth=1, linestyle=":", label="crossover")
        known = [(100 * point.share, 100 * point.byte_share) for point in curve.points if point.byte_share]
        _line(sizes, [share for share, _ in known], [percent for _, percent in known], look, label)
    sizes.axhline(100, color=LINE, linewidth=1.2, linestyle="--", label="full refit")
    times.set_ylabel(f"median refit time ({unit})")
    sizes.set_ylabel("bytes between ranks (% of a full refit)")
    for axes in (times, sizes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(picture_text("changed (% of the weights)"))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        grid(axes, "both")
    legend(figure)
    return figure


def _line(axes: Axes, shares: Sequence[float], values: Sequence[float], look: Look, label: str) -> None:
    axes.plot(
        shares, values, look.marker, linestyle="-", color=look.color, markeredgecolor="black", markersize=7, label=label
    )
