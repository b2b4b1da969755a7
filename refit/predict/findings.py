"""What a search of layouts found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from refit.config.layout import Layout
from refit.config.relay import Relay
from refit.plan.cost import Bound, BusiestRank
from refit.predict.serving.cycle import Cycle, Rollouts


class Objective(str, Enum):
    """What layouts are ranked by: the refit's bound, a decode step's, or that of a whole cycle."""

    REFIT = "refit"
    DECODE = "decode"
    CYCLE = "cycle"


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
    `crossing` is None where all ranks are in one node. `layout` are the destination's sizes. Where serving is asked
    for, `rollouts` has its bounds, `train_s` that of a training step, and `largest_batch` the sequences whose cache
    fits.
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
    layout: Layout | None = None
    rollouts: Rollouts | None = None
    train_s: float = 0.0
    largest_batch: int | None = None

    @property
    def bound_s(self) -> float:
        """Infinite where there is no bound."""
        return self.bound.seconds if self.bound else math.inf

    @property
    def cycle(self) -> Cycle | None:
        return self.rollouts.cycle(self.train_s, self.bound_s) if self.rollouts is not None else None

    def value(self, objective: Objective) -> float:
        """Seconds that `objective` ranks by."""
        return value_of(objective, self.bound_s, self.rollouts, self.train_s)

    @property
    def kind(self) -> Kind:
        return kind_of(self.source, self.destination, self.layout)


def value_of(objective: Objective, refit_s: float, rollouts: Rollouts | None, train_s: float) -> float:
    """Seconds that `objective` ranks by, with a refit of `refit_s`. Infinite where there is no bound."""
    if objective is Objective.REFIT or rollouts is None:
        return refit_s
    if objective is Objective.DECODE:
        return rollouts.decode.seconds
    return rollouts.cycle(train_s, refit_s).seconds


Kind = tuple[object, ...]
"""Equal for layouts that differ in how EP x ETP divides the experts alone."""


def kind_of(source: str, destination: str, layout: Layout | None) -> Kind:
    """`source` and `destination` are titles."""
    if layout is None:
        return (source, destination)
    words = tuple(word for word in destination.split() if not word.startswith(("EP", "ETP")))
    return (source, words, layout.tp, layout.pp, layout.ep * layout.etp)


@dataclass(frozen=True)
class Findings:
    """The candidates found, the best by `objective` first, and how many pairs were left out.

    `num_built` pairs can be built, `num_too_large` of them do not fit, `num_batch_too_large` cannot hold the batch's
    cache, `num_unbounded` have no bound of serving since the cluster has no speed between nodes. `num_beaten` were not
    planned since one that was found is as good in both the objective and memory, whatever their plans;
    `every`: all that fit were to be planned. `num_unplanned` were not beyond the most plans: what they are ranked by is
    at least `unplanned_floor_s`.
    `pareto` are indices into `found`: no other candidate is as good in both, but equal ones behind it. `kinds` says how
    many layouts fit of each kind, `refused` has a reason and the layouts of a format that are none of its.
    """

    found: tuple[Found, ...]
    num_built: int
    num_too_large: int
    num_unplanned: int
    unplanned_floor_s: float | None
    objective: Objective = Objective.REFIT
    every: bool = True
    num_batch_too_large: int = 0
    num_unbounded: int = 0
    num_beaten: int = 0
    kinds: Mapping[Kind, int] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @cached_property
    def pareto(self) -> frozenset[int]:
        points = [
            (one.busiest.nbytes if math.isinf(value := one.value(self.objective)) else value, one.memory_bytes)
            for one in self.found
        ]
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
