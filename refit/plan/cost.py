"""What a plan costs: bytes per rank and pair, who is busiest, and the least time a cluster needs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refit import units
from refit.plan.plan import ZEROS, IntArray, RefitPlan


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines a scenario is judged by; speeds are one GPU's in one direction, in bytes per second.

    A node is an NVLink domain: the GPUs that reach each other at `intra_bytes_per_s`, `gpus_per_node` of them (8 in an
    HGX host, 72 in an NVL72 rack). Between nodes it is `inter_bytes_per_s`, None where only one node is described.
    `copy_bytes_per_s` counts bytes copied within a GPU once, not as read and write; None leaves local copies out of the
    bound. `gpu_memory_bytes` is None where it is not known. `gpu` is the end of the device's name by which a run finds
    its cluster, None where it must be named. `source` says where the figures come from.
    """

    name: str
    intra_bytes_per_s: float
    inter_bytes_per_s: float | None
    gpus_per_node: int
    copy_bytes_per_s: float | None
    gpu_memory_bytes: int | None
    gpu: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds no refit by a plan can beat, and what sets them: `rank 64 receives 65.93 GB between nodes at 50 GB/s`."""

    seconds: float
    limited_by: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """Wire bytes of every rank, those that stay within its node apart from those between nodes. Each `[num_ranks]`.

    Ranks are counted in order: the first `gpus_per_node` are node 0, the next ones node 1.
    """

    gpus_per_node: int
    sent_within: IntArray
    sent_between: IntArray
    received_within: IntArray
    received_between: IntArray
    local: IntArray


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


def cost_of(plan: RefitPlan) -> Cost:
    """Add up a plan's bytes, counted in the destination's dtypes."""
    matrix = bytes_matrix(plan)
    local = {rank: int(matrix[rank, rank]) for rank in plan.destination_sharding.ranks}
    np.fill_diagonal(matrix, 0)
    return Cost(
        payload_bytes=int(plan.nbytes.sum()),
        wire_bytes=int(matrix.sum()),
        local_bytes=sum(local.values()),
        num_transfers=int((plan.source != ZEROS).sum()),
        sent={rank: int(matrix[rank].sum()) for rank in plan.source_sharding.ranks},
        received={rank: int(matrix[:, rank].sum()) for rank in plan.destination_sharding.ranks},
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
        "source_weights_by_rank": dict(plan.source_sharding.bytes_per_rank),
        "destination_weights_by_rank": dict(plan.destination_sharding.bytes_per_rank),
    }


def bytes_matrix(plan: RefitPlan) -> IntArray:
    """Bytes from each rank (row) to each rank (column), `[num_ranks, num_ranks]`; local copies on the diagonal."""
    num_ranks = 1 + max(*plan.source_sharding.ranks, *plan.destination_sharding.ranks)
    matrix = np.zeros((num_ranks, num_ranks), np.int64)
    moved = plan.source != ZEROS
    np.add.at(matrix, (plan.source[moved], plan.destination[moved]), plan.nbytes[moved])
    return matrix


def split_traffic(matrix: IntArray, gpus_per_node: int) -> Traffic:
    """Sort a `bytes_matrix` by whether its bytes cross from one node of `gpus_per_node` ranks to another."""
    node = np.arange(len(matrix)) // gpus_per_node
    between = np.where(node[:, None] != node[None, :], matrix, 0)
    within = matrix - between
    local = np.diagonal(matrix).copy()
    np.fill_diagonal(within, 0)
    return Traffic(gpus_per_node, within.sum(1), between.sum(1), within.sum(0), between.sum(0), local)


def lower_bound(matrix: IntArray, cluster: Cluster) -> Bound | None:
    """The longest any rank needs for its bytes of one kind and direction at the cluster's full speed for them.

    The two kinds of link, their two directions and copies within a GPU all work at the same time, so the slowest of
    them bounds the refit. None where bytes cross nodes and the cluster has no speed between them. Where fewer ranks run
    on a node than it has GPUs, some bytes between nodes are counted as within one: the bound is then low, never high.
    """
    traffic = split_traffic(matrix, cluster.gpus_per_node)
    if cluster.inter_bytes_per_s is None and traffic.sent_between.any():
        return None
    candidates = [
        (traffic.received_between, cluster.inter_bytes_per_s, "receives", "between nodes"),
        (traffic.sent_between, cluster.inter_bytes_per_s, "sends", "between nodes"),
        (traffic.received_within, cluster.intra_bytes_per_s, "receives", "within its node"),
        (traffic.sent_within, cluster.intra_bytes_per_s, "sends", "within its node"),
        (traffic.local, cluster.copy_bytes_per_s, "copies", "within its GPU"),
    ]
    worst = Bound(0.0, "nothing moves")
    for nbytes, bytes_per_s, verb, where in candidates:
        rank = int(nbytes.argmax())
        if bytes_per_s and nbytes[rank] / bytes_per_s > worst.seconds:
            cause = f"rank {rank} {verb} {units.gb(int(nbytes[rank]))} {where} at {bytes_per_s / 1e9:g} GB/s"
            worst = Bound(float(nbytes[rank] / bytes_per_s), cause)
    return worst


def _busiest(loads: Mapping[int, int]) -> Load:
    """The rank with most bytes, the first of several."""
    rank = max(loads, key=lambda rank: (loads[rank], -rank))
    return Load(rank, loads[rank])
