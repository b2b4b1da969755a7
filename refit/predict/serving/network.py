"""Bytes that the collectives of a pass move over the links of a GPU, and the time that these take.

A GPU has two links: to its node (NVLink), and between nodes. A collective moves bytes over both at the same time, so
the slower one counts.

- All-reduce of S bytes over n ranks: a rank sends 2 (n - 1) / n S, the least there can be without reduction in the
  switches (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"). Over k nodes of g ranks each, every
  rank reduces 1/g of S with its counterparts: 2 (k - 1) / k S / g between nodes, 2 (g - 1) / g S within.
- Dispatch of tokens to experts: a token crosses once to each other node that it has to reach, and within that node on
  to the further ranks (as DeepEP's kernels do; DeepSeek-V3, arXiv:2412.19437, section 3.2.2). Combining takes the same
  way back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from refit.config.clusters import Cluster
from refit.predict.serving.experts import Slots


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that a GPU sends, or gets, within its node and between nodes, in one direction."""

    within: float = 0.0
    between: float = 0.0

    def times(self, factor: float) -> Moved:
        return Moved(factor * self.within, factor * self.between)

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.within + other.within, self.between + other.between)

    def seconds(self, cluster: Cluster) -> float:
        """Infinite where bytes cross between nodes and the cluster states no speed for that."""
        if self.between and cluster.inter_bytes_per_s is None:
            return math.inf
        return max(self.within / cluster.intra_bytes_per_s, self.between / (cluster.inter_bytes_per_s or math.inf))


NOTHING = Moved()


def all_reduce(nbytes: float, ranks: Sequence[int], per_node: int) -> Moved:
    """Of `nbytes` on each of `ranks`."""
    nodes = _by_node(ranks, per_node)
    within, across = max(map(len, nodes)), len(nodes)
    return Moved(2 * (within - 1) / within * nbytes, 2 * (across - 1) / across * nbytes / within)


def send(nbytes: float, source: int, destination: int, per_node: int) -> Moved:
    return Moved(nbytes) if source // per_node == destination // per_node else Moved(0.0, nbytes)


def dispatch(nbytes: float, tokens: float, slots: Slots, group: Sequence[int], etp: int, per_node: int) -> Moved:
    """Of `tokens` tokens, evenly spread over the ranks `group`, to all ranks with their experts: what the busiest gets.

    A token has `nbytes`. The first `etp` ranks of the group have a slice each of the same experts, and so on.
    """
    nodes = _by_node(group, per_node)
    across, span = len(nodes), len(group)
    experts_on = [sorted({place // etp for place in places}) for places in nodes]
    reached = slots.reached(experts_on)
    busiest = float(max(chance / len(places) for chance, places in zip(reached, nodes, strict=True)))
    between = (1 - 1 / across) * tokens * busiest
    arriving = (1 - 1 / span) * tokens * float(max(slots.reached([[rank] for rank in range(slots.num_ranks)])))
    return Moved(max(0.0, arriving - between), between).times(nbytes)


def _by_node(ranks: Sequence[int], per_node: int) -> list[list[int]]:
    """Places in `ranks` by node."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, rank in enumerate(ranks):
        found[rank // per_node].append(place)
    return list(found.values())
