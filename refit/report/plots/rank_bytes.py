"""Bytes that each rank sends and receives, split into those within a node and those between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refit.plan.box_array import IntArray
from refit.plan.cost import Cost, split_traffic
from refit.report.plots.nodes import draw_node_lines, node_size
from refit.report.plots.style import (
    MAX_NUMBERED_RANKS,
    METHOD_LOOKS,
    TITLE_WIDTH,
    Look,
    byte_scale,
    grid,
    legend,
    new_figure,
    rank_axis,
    wrapped,
)
from refit.results.outcomes import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one kind that each rank receives and sends, in the ranks' order."""

    label: str
    look: Look
    received: Sequence[int]
    sent: Sequence[int]


def rank_bytes_figure(outcome: Outcome, plan: Cost, matrix: IntArray | None, under: str) -> Figure:
    """Wire bytes of each rank: received above the axis, sent below; the mean of each side's ranks dashed.

    With the bytes of each pair of ranks, `[num_ranks, num_ranks]`, bars are split within and between nodes.
    """
    sides = (plan.received_by_rank, plan.sent_by_rank)
    ranks = sorted({rank for side in sides for rank in side})
    scale, unit = byte_scale(max((nbytes for side in sides for nbytes in side.values()), default=0))
    figure = new_figure(10, 4.6, f"{wrapped(outcome.planned.name, TITLE_WIDTH)}\nbytes of each rank", under)
    axes = figure.add_subplot()
    _stack(axes, ranks, _shares(outcome, plan, matrix, ranks), scale)
    for side, sign, word, line in ((sides[0], 1, "received", "--"), (sides[1], -1, "sent", ":")):
        mean = sign * sum(side.values()) / max(len(side), 1) / scale
        axes.axhline(mean, color="black", linestyle=line, linewidth=1, label=f"mean {word}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_ylabel(f"wire bytes ({unit})\nsent below, received above")
    axes.set_xlim(ranks[0] - 0.7, ranks[-1] + 0.7)
    draw_node_lines(axes, node_size(outcome), range(ranks[0], ranks[-1] + 1), along="x")
    rank_axis(axes.xaxis, ranks[-1] - ranks[0] + 1)
    axes.set_xlabel("rank")
    grid(axes, "y")
    legend(figure)
    return figure


def _shares(outcome: Outcome, plan: Cost, matrix: IntArray | None, ranks: Sequence[int]) -> list[Share]:
    if matrix is None:
        received, sent = ([side.get(rank, 0) for rank in ranks] for side in (plan.received_by_rank, plan.sent_by_rank))
        return [Share("over the wire", METHOD_LOOKS[1], received, sent)]
    traffic = split_traffic(matrix, node_size(outcome))
    columns = (traffic.received_within, traffic.sent_within, traffic.received_between, traffic.sent_between)
    within_in, within_out, between_in, between_out = ([int(column[rank]) for rank in ranks] for column in columns)
    shares = [
        Share("within a node", METHOD_LOOKS[1], within_in, within_out),
        Share("between nodes", METHOD_LOOKS[0], between_in, between_out),
    ]
    return [share for share in shares if any(share.received) or any(share.sent)]


def _stack(axes: Axes, ranks: Sequence[int], shares: Sequence[Share], scale: float) -> None:
    # Outlines and hatches of many narrow bars would cover them.
    is_narrow = len(ranks) > 2 * MAX_NUMBERED_RANKS
    tops = {1: [0.0] * len(ranks), -1: [0.0] * len(ranks)}
    for share in shares:
        fill = {"color": share.look.color} if is_narrow else share.look.fill
        for sign, nbytes in ((1, share.received), (-1, share.sent)):
            heights = [sign * count / scale for count in nbytes]
            axes.bar(ranks, heights, bottom=tops[sign], width=0.8, label=share.label, **fill)
            tops[sign] = [top + height for top, height in zip(tops[sign], heights, strict=True)]
