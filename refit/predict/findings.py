"""What a search of layouts found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from refit.config.relay import Relay
from refit.plan.cost import Bound, BusiestRank


@dataclass(frozen=True, slots=True)
class Crossing:
    """What a plan moves between the nodes of a cluster and within them, with its `relay`: off, node or engine.

    `least_bytes` cross in every plan, `direct_bytes` in that without a relay.
    """

    relay: Relay
    between_bytes: int
    within_bytes: int
    least_bytes: int
    direct_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """One planned candidate. `kv_room_bytes` is the GPU memory left beside `memory_bytes`, `kv_tokens` the tokens
    whose cache fits there on one replica of the attention; both None where the cluster's memory is not known.
    `bound` is None where the cluster has no speed for bytes that cross its nodes. It is that of a refit that sends
    changes of `share` of the weights; None: everything. `floor` is the least bound of all plans that send everything.
    `crossing` is None where all ranks are in one node.
    """

    flags: tuple[str, ...]
    source: str
    destination: str
    source_ranks: int
    destination_ranks: int
    payload_bytes: int
    wire_bytes: int
    busiest: BusiestRank
    sender_imbalance: float
    memory_bytes: int
    kv_room_bytes: int | None
    kv_tokens: int | None
    bound: Bound | None
    share: float | None = None
    floor: Bound | None = None
    crossing: Crossing | None = None

    @property
    def bound_s(self) -> float:
        """Infinite where there is no bound."""
        return self.bound.seconds if self.bound else math.inf


@dataclass(frozen=True)
class Findings:
    """The candidates found, lowest bound first, and how many pairs were left out.

    `num_built` pairs can be built, `num_too_large` of them do not fit, and `num_unplanned` fit but were not planned:
    their bounds are at least `unplanned_floor_s`. `pareto` are indices into `found`: no other candidate is as good in
    both lower bound and memory, but equal ones behind it.
    """

    found: tuple[Found, ...]
    num_built: int
    num_too_large: int
    num_unplanned: int
    unplanned_floor_s: float | None

    @cached_property
    def pareto(self) -> frozenset[int]:
        points = [(one.bound_s if one.bound else one.busiest.nbytes, one.memory_bytes) for one in self.found]
        return frozenset(pareto(points))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both coordinates; of equal points the first."""
    front: list[int] = []
    least = math.inf
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < least:
            front.append(index)
            least = points[index][1]
    return sorted(front)
