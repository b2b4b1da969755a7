"""Refit time against bytes, with the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refit import units
from refit.report.plots.style import LINE, byte_scale, grid, method_look, new_figure, time_scale, wrapped_text
from refit.report.refits.scaling import Scaling
from refit.report.terminal.escaped import picture_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scaling_figure(groups: Sequence[Scaling], under: str) -> Figure:
    """Median time of each scenario against the bytes of its busiest rank, one panel per mode.

    Lines join the times that the fit gives for the same scenarios. They are drawn only where a conclusion may be drawn
    from the fit; below each panel is what it says, or why there is none.
    """
    modes = list(dict.fromkeys(group.mode for group in groups))
    most = max(sum(group.mode == mode for group in groups) for mode in modes)
    figure = new_figure(
        6.2 * len(modes) + (len(modes) == 1) * 1.5, 4.6 + 0.45 * most, "Refit time against bytes", under
    )
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, [group for group in groups if group.mode == mode])
        axes.set_title(picture_text(mode), fontsize=10)
    return figure


def _panel(axes: Axes, groups: Sequence[Scaling]) -> None:
    loads = [load for group in groups for load in group.loads]
    scale, byte_unit = byte_scale(max((load.nbytes for load in loads), default=0.0))
    factor, time_unit = time_scale(max((load.seconds for load in loads), default=0.0))
    for group in groups:
        look = method_look(group.method)
        ordered = sorted(group.loads, key=lambda load: load.nbytes)
        sizes = [load.nbytes / scale for load in ordered]
        axes.plot(
            sizes,
            [factor * load.seconds for load in ordered],
            look.marker,
            color=look.color,
            markeredgecolor="black",
            markersize=7,
            clip_on=False,
            zorder=3,
            label=f"{picture_text(group.method)}: {describe(group)}",
        )
        if group.fit and not group.reason:
            times = [factor * (group.fit.operations_s(load) + group.fit.bytes_s(load)) for load in ordered]
            axes.plot(sizes, times, color=LINE, linewidth=1.2, linestyle="--", zorder=1)
    axes.set_xlim(0, 1.1 * axes.dataLim.xmax if loads else 1)
    axes.set_ylim(0, 1.15 * axes.dataLim.ymax if loads else 1)
    axes.set_xlabel(f"busiest rank's wire bytes ({byte_unit})")
    axes.set_ylabel(f"median refit time ({time_unit})")
    grid(axes, "both")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False, fontsize=8, labelspacing=0.8)


def describe(group: Scaling) -> str:
    """What the fit says, or why nothing is concluded from it."""
    if group.reason or group.fit is None:
        return wrapped_text(group.reason or "", 70)
    fit = group.fit
    return (
        f"{units.seconds(fit.operation_s)} per transfer + bytes / {fit.bytes_per_s / 1e9:.1f} GB/s\n"
        f"(dashed; {len(group.loads)} scenarios, off by {100 * fit.worst_error:.0f} % at most)"
    )
