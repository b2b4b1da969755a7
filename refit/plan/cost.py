"""What a plan costs: bytes per rank and pair, who is busiest, and the least time a link needs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refit.plan.plan import ZEROS, IntArray, RefitPlan


@dataclass(frozen=True, slots=True)
class Cluster:
    """The network a scenario is judged by. `link_bytes_per_s` is one GPU's speed in one direction.

    `gpu_memory_bytes` is None where it is not known; `source` says where the figures come from.
    """

    name: str
    link_bytes_per_s: float
    gpu_memory_bytes: int | None
    source: str


@dataclass(frozen=True, slots=True)
class Load:
    """A rank and its bytes."""

    rank: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of one refit. `sent` has every source rank, `received` every destination rank, wire bytes only.

    payload = wire + local + zeros: all bytes written at the destination.
    """

    payload_bytes: int
    wire_bytes: int
    local_bytes: int
    num_transfers: int
    sent: Mapping[int, int]
    received: Mapping[int, int]
    local: Mapping[int, int]

    @property
    def busiest_sender(self) -> Load:
        return _busiest(self.sent)

    @property
    def busiest_receiver(self) -> Load:
        return _busiest(self.received)

    @property
    def sender_imbalance(self) -> float:
        """Busiest sender over mean sender of all source ranks; 1 where nothing is sent."""
        return self.busiest_sender.nbytes * len(self.sent) / self.wire_bytes if self.wire_bytes else 1.0

    @property
    def busiest_bytes(self) -> int:
        """max over ranks of max(sent, received): links carry both directions at once."""
        return max(self.busiest_sender.nbytes, self.busiest_receiver.nbytes)

    def lower_bound_s(self, bytes_per_s: float) -> float:
        """Seconds no refit by this plan can beat: the busiest rank's busier direction at full link speed."""
        return self.busiest_bytes / bytes_per_s


def cost_of(plan: RefitPlan) -> Cost:
    """Add up a plan's bytes, counted in the destination's dtypes."""
    matrix = bytes_matrix(plan)
    local = {rank: int(matrix[rank, rank]) for rank in plan.destination_census.ranks}
    np.fill_diagonal(matrix, 0)
    return Cost(
        payload_bytes=int(plan.nbytes.sum()),
        wire_bytes=int(matrix.sum()),
        local_bytes=sum(local.values()),
        num_transfers=int((plan.source != ZEROS).sum()),
        sent={rank: int(matrix[rank].sum()) for rank in plan.source_census.ranks},
        received={rank: int(matrix[:, rank].sum()) for rank in plan.destination_census.ranks},
        local=local,
    )


def summary(plan: RefitPlan) -> dict[str, Any]:
    """A plan's bytes, in plain types, for a result file."""
    cost = cost_of(plan)
    return {
        "payload": cost.payload_bytes,
        "wire": cost.wire_bytes,
        "local": cost.local_bytes,
        "busiest": cost.busiest_bytes,
        "sender_imbalance": cost.sender_imbalance,
        "sent_by_rank": dict(cost.sent),
        "received_by_rank": dict(cost.received),
        "local_by_rank": dict(cost.local),
        "source_weights_by_rank": dict(plan.source_census.bytes_per_rank),
        "destination_weights_by_rank": dict(plan.destination_census.bytes_per_rank),
    }


def bytes_matrix(plan: RefitPlan) -> IntArray:
    """Bytes from each rank (row) to each rank (column), `[num_ranks, num_ranks]`; local copies on the diagonal."""
    num_ranks = 1 + max(*plan.source_census.ranks, *plan.destination_census.ranks)
    matrix = np.zeros((num_ranks, num_ranks), np.int64)
    moved = plan.source != ZEROS
    np.add.at(matrix, (plan.source[moved], plan.destination[moved]), plan.nbytes[moved])
    return matrix


def _busiest(loads: Mapping[int, int]) -> Load:
    """The rank with most bytes, the first of several."""
    rank = max(loads, key=lambda rank: (loads[rank], -rank))
    return Load(rank, loads[rank])
