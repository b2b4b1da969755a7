"""Where nodes and groups of ranks begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refit.config.layout import Layout
from refit.results.outcomes import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def node_size(outcome: Outcome) -> int:
    """Ranks of one node: the NVLink domain of the cluster that the scenario names, else the ranks of a host."""
    scenario = outcome.result.scenario if outcome.result else None
    cluster = scenario.cluster if scenario else None
    shared = scenario.ranks_per_gpu if scenario else 1
    return max(1, cluster.gpus_per_node * shared if cluster else outcome.planned.ranks_per_node)


def draw_node_lines(axes: Axes, size: int, ranks: range, along: str) -> None:
    """A thick line where a node of `size` ranks begins; `along` is the axis of the ranks, x or y."""
    line = axes.axvline if along == "x" else axes.axhline
    for first in range(ranks.start - ranks.start % size + size, ranks.stop, size):
        label = "node boundary" if along == "x" else None
        line(first - 0.5, color="black", linewidth=2.2, label=label)


def expert_groups(layout: Layout) -> dict[str, range]:
    """Consecutive ranks that together hold one copy of the same experts, by name (`PP0 EP3`).

    Empty where all ranks are one group.
    """
    sizes = {"PP": layout.pp, "EDP": layout.edp, "EP": layout.ep}
    groups: dict[str, range] = {}
    for first in layout.ranks[:: layout.etp]:
        at = layout.coordinates(first)
        places = {"PP": at.pp, "EDP": at.edp, "EP": at.ep}
        name = " ".join(f"{axis}{places[axis]}" for axis, size in sizes.items() if size > 1)
        groups[name] = range(first, first + layout.etp)
    return groups if len(groups) > 1 else {}
