"""Heat map of the bytes between every pair of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from refit.config.layout import Layout
from refit.plan.box_array import IntArray
from refit.report.plots.nodes import draw_node_lines, expert_groups, node_size
from refit.report.plots.style import MAX_NUMBERED_RANKS, TITLE_WIDTH, byte_scale, new_figure, rank_axis, wrapped
from refit.results.outcomes import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pairs = Callable[[Outcome], IntArray]
"""Gives the bytes from each rank (row) to each rank (column) of a scenario, or raises NoPairs."""

MAX_NAMED_GROUPS = 32


class NoPairs(ValueError):
    """The bytes between pairs of ranks are not available. The message gives the reason."""


def pairs_figure(outcome: Outcome, matrix: IntArray, under: str) -> Figure:
    """Heat map of bytes from each source rank (rows) to each destination rank (columns); nothing moved is white.

    Thick lines divide nodes, thin ones the groups of source ranks that share experts. Raises
    NoPairs where the matrix is not that of the scenario's ranks.
    """
    scenario = outcome.result.scenario if outcome.result else None
    everyone = range(len(matrix))
    rows, columns = (scenario.source.ranks, scenario.destination.ranks) if scenario else (everyone, everyone)
    if max(rows.stop, columns.stop) > len(matrix):
        raise NoPairs(f"its flags give {len(matrix)} ranks, its layouts {max(rows.stop, columns.stop)}")
    shown = matrix[rows.start : rows.stop, columns.start : columns.stop].astype(float)
    scale, unit = byte_scale(shown.max(initial=0))
    local = "; same rank: a local copy" if set(rows) & set(columns) else ""
    title = f"{wrapped(outcome.planned.name, TITLE_WIDTH)}\nbytes of each pair of ranks{local}"
    figure = new_figure(8.4, 7, title, under)
    axes = figure.add_subplot()
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    masked = np.ma.masked_equal(shown / scale, 0)
    # From light to dark, so that it reads in grey.
    image = axes.imshow(masked, cmap="cividis_r", vmin=0, extent=extent, interpolation="nearest", aspect="auto")
    has_groups = scenario is not None and _draw_groups(axes, scenario.source.layout)
    figure.colorbar(
        image, ax=axes, label=f"{unit} from source to destination rank (white: none)", pad=0.04 if has_groups else 0.02
    )
    size = node_size(outcome)
    draw_node_lines(axes, size, rows, along="y")
    draw_node_lines(axes, size, columns, along="x")
    if max(shown.shape) <= MAX_NUMBERED_RANKS:
        _write_cells(axes, shown / scale, rows.start, columns.start)
    rank_axis(axes.xaxis, len(columns))
    rank_axis(axes.yaxis, len(rows))
    crosses = any(ranks.start // size != (ranks.stop - 1) // size for ranks in (rows, columns))
    axes.set_xlabel("destination rank" + ("; thick lines: nodes" if crosses else ""))
    axes.set_ylabel("source rank")
    return figure


def _draw_groups(axes: Axes, layout: Layout) -> bool:
    """Lines between groups of source ranks, with their names at the right; whether there are any."""
    groups = expert_groups(layout)
    for group in list(groups.values())[1:]:
        axes.axhline(group.start - 0.5, color="white", linewidth=2.4)
        axes.axhline(group.start - 0.5, color="black", linewidth=0.9)
    if len(groups) > MAX_NAMED_GROUPS:
        return False
    for name, group in groups.items():
        middle = (group.start + group.stop - 1) / 2
        axes.annotate(
            name, (1.01, middle), xycoords=axes.get_yaxis_transform(), va="center", fontsize=7, annotation_clip=False
        )
    return bool(groups)


def _write_cells(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]], first_row: int, first_column: int) -> None:
    for row, column in np.argwhere(values):
        value = values[row, column]
        color = "white" if value > values.max() / 2 else "black"
        place = (first_column + column, first_row + row)
        axes.annotate(
            f"{value:.2f}" if value >= 0.005 else "~0", place, color=color, ha="center", va="center", fontsize=8
        )
