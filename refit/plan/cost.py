"""The cost of a plan: bytes per rank and pair of ranks, the busiest ranks, and the lower bound on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from refit import units
from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.plan.box_array import BoolArray, Column, IntArray
from refit.plan.pieces import ZEROS
from refit.plan.plan import RefitPlan


@dataclass(frozen=True, slots=True)
class Bound:
    """The lower bound of a plan's refit time."""

    cluster: str
    """The name of the one with these speeds."""
    seconds: float
    limited_by: str
    """What sets it: `rank 64 receives 65.93 GB between nodes at 50 GB/s`."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of every rank, each `[num_ranks]`: wire bytes within and between nodes, and local copies.

    Ranks fill nodes in order: the first `ranks_per_node` ranks are node 0, the next ones node 1.
    """

    ranks_per_node: int
    sent_within: IntArray
    sent_between: IntArray
    received_within: IntArray
    received_between: IntArray
    local: IntArray


@dataclass(frozen=True, slots=True)
class BusiestRank:
    """The rank with the most wire bytes in one direction. Of several with equally many, the lowest rank."""

    rank: int
    nbytes: int
    direction: Literal["sends", "receives"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan moves, in plain types. Bytes are counted in the destination's dtypes.

    Sent and received are wire bytes only, those of all stages: a byte that is passed on is sent twice.
    """

    payload_bytes: int
    """All bytes written at the destination: wire bytes, local copies and zeros."""
    wire_bytes: int
    """Those that leave a rank."""
    local_bytes: int
    """Those copied within a rank."""
    num_transfers: int
    """Over the wire, and local copies."""
    sent_by_rank: dict[int, int]
    """Of every source rank, and of those that pass weights on in a later stage."""
    received_by_rank: dict[int, int]
    """Of every destination rank."""
    local_by_rank: dict[int, int]
    """Of every destination rank."""
    source_weights_by_rank: dict[int, int]
    """Bytes of weights that ranks hold."""
    destination_weights_by_rank: dict[int, int]
    """The same of the destination."""
    digest: str
    """SHA-256 of the plan."""
    casts: dict[str, tuple[str, str]]
    """Dtypes before and after, of tensors that change theirs."""

    @property
    def busiest_sender(self) -> BusiestRank:
        return _busiest(self.sent_by_rank, "sends")

    @property
    def busiest_receiver(self) -> BusiestRank:
        return _busiest(self.received_by_rank, "receives")

    @property
    def busiest(self) -> BusiestRank:
        """The rank with the most wire bytes in either direction, as links carry both at once.

        The receiver where sender and receiver have equally many.
        """
        sender, receiver = self.busiest_sender, self.busiest_receiver
        return receiver if receiver.nbytes >= sender.nbytes else sender

    @property
    def sender_imbalance(self) -> float:
        """Bytes of the busiest sender over the mean of those in `sent_by_rank`; 1 where nothing is sent."""
        return self.busiest_sender.nbytes * len(self.sent_by_rank) / self.wire_bytes if self.wire_bytes else 1.0


def cost_of(plan: RefitPlan) -> Cost:
    """Add up the bytes of a plan."""
    wire, local = plan.is_wire, plan.is_local
    sent = bytes_by_rank(plan, plan.source, wire)
    received = bytes_by_rank(plan, plan.destination, wire)
    copied = bytes_by_rank(plan, plan.destination, local)
    relays = sorted(set(plan.source[wire & (plan.stage > 0)].tolist()) - set(plan.source_sharding.ranks))
    return Cost(
        payload_bytes=int(plan.nbytes.sum()),
        wire_bytes=int(sent.sum()),
        local_bytes=int(copied.sum()),
        num_transfers=plan.num_transfers,
        sent_by_rank={rank: int(sent[rank]) for rank in (*plan.source_sharding.ranks, *relays)},
        received_by_rank={rank: int(received[rank]) for rank in plan.destination_sharding.ranks},
        local_by_rank={rank: int(copied[rank]) for rank in plan.destination_sharding.ranks},
        source_weights_by_rank=dict(plan.source_sharding.bytes_per_rank),
        destination_weights_by_rank=dict(plan.destination_sharding.bytes_per_rank),
        digest=plan.digest,
        casts=plan.casts,
    )


def bytes_by_rank(plan: RefitPlan, rank: Column, routes: BoolArray) -> IntArray:
    """Bytes of these routes by `rank`, the plan's column of one end, `[num_ranks]`."""
    nbytes = np.zeros(1 + plan.ranks[-1], np.int64)
    np.add.at(nbytes, rank[routes], plan.nbytes[routes])
    return nbytes


def bytes_matrix(plan: RefitPlan, nbytes: IntArray | None = None) -> IntArray:
    """Bytes from each rank (row) to each rank (column), `[num_ranks, num_ranks]`. The diagonal has local copies.

    `nbytes` are those of each route, `[num_routes]`; None: all that it writes. Those of all stages: stages overlap,
    message by message, so that a link has the bytes of all to carry in one refit.
    """
    num_ranks = 1 + plan.ranks[-1]
    matrix = np.zeros((num_ranks, num_ranks), np.int64)
    moved = np.flatnonzero(plan.source != ZEROS)
    pair = np.multiply(plan.source[moved], num_ranks, dtype=np.int64)
    pair += plan.destination[moved]
    np.add.at(matrix.reshape(-1), pair, (plan.nbytes if nbytes is None else nbytes)[moved])
    return matrix


def wire_only(matrix: IntArray) -> IntArray:
    """A copy of a `bytes_matrix` without local copies: its diagonal is 0."""
    wire = matrix.copy()
    np.fill_diagonal(wire, 0)
    return wire


def per_gpu(matrix: IntArray, gpus: GpuMap) -> IntArray:
    """A `bytes_matrix` from each GPU to each GPU. The diagonal has what a GPU's ranks copy, each for itself or to
    another rank of that GPU."""
    of_rank = np.array([gpus.gpu_of(rank) for rank in range(len(matrix))], np.int64)
    num_gpus = 1 + int(of_rank.max(initial=-1))
    rows = np.zeros((num_gpus, len(matrix)), np.int64)
    np.add.at(rows, of_rank, matrix)
    summed = np.zeros((num_gpus, num_gpus), np.int64)
    np.add.at(summed.T, of_rank, rows.T)
    return summed


def split_traffic(matrix: IntArray, ranks_per_node: int) -> Traffic:
    """Divide a `bytes_matrix` into traffic within nodes of `ranks_per_node` ranks and traffic between them."""
    num_ranks = len(matrix)
    local = np.diagonal(matrix).copy()
    sent_within, received_within = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    for first in range(0, num_ranks, ranks_per_node):  # node by node: thousands of ranks make a large matrix
        node = slice(first, first + ranks_per_node)
        sent_within[node], received_within[node] = matrix[node, node].sum(1), matrix[node, node].sum(0)
    sent_between, received_between = matrix.sum(1) - sent_within, matrix.sum(0) - received_within
    return Traffic(ranks_per_node, sent_within - local, sent_between, received_within - local, received_between, local)


def lower_bound(
    matrix: IntArray, cluster: Cluster, gpus: GpuMap | None = None, work: Mapping[int, int] | None = None
) -> Bound | None:
    """The longest time that any GPU needs for its bytes of one kind at the cluster's full speed for them.

    `gpus` says which ranks share a GPU; None: none do. The bytes of its ranks add up, on its links and in its memory:
    those between two of them cross no link, and are read and written there as local copies are. `work` are the bytes
    that encodings read and write on each rank beyond these (`Wire.work_bytes`).

    The kinds are sends and receives, each within and between nodes, and copies within a GPU with the work there. They
    can all overlap, also those of several stages, so the slowest is a lower bound of the refit time. None where bytes
    cross nodes and the cluster states no speed for that. Where nodes run fewer ranks than they have GPUs, some bytes
    between nodes count as bytes within a node. The bound is then too low, never too high.
    """
    subject, memory = "rank", "within its GPU"
    extra = np.zeros(len(matrix), np.int64)
    for rank, added in (work or {}).items():
        extra[rank] = added
    if gpus is not None and gpus.is_shared:
        extra = np.diagonal(per_gpu(np.diag(extra), gpus))
        matrix, subject, memory = per_gpu(matrix, gpus), "GPU", "within its memory"
    traffic = split_traffic(matrix, cluster.gpus_per_node)
    if cluster.inter_bytes_per_s is None and traffic.sent_between.any():
        return None
    candidates: list[tuple[IntArray, float | None, str, str]] = [
        (traffic.received_between, cluster.inter_bytes_per_s, "receives", "between nodes"),
        (traffic.sent_between, cluster.inter_bytes_per_s, "sends", "between nodes"),
        (traffic.received_within, cluster.intra_bytes_per_s, "receives", "within its node"),
        (traffic.sent_within, cluster.intra_bytes_per_s, "sends", "within its node"),
    ]
    if cluster.copy_bytes_per_s is not None and not extra.any():
        candidates.append((traffic.local, cluster.copy_bytes_per_s, "copies", memory))
    elif cluster.copy_bytes_per_s is not None:
        candidates.append((2 * traffic.local + extra, 2 * cluster.copy_bytes_per_s, "reads and writes", memory))
    worst = Bound(cluster.name, 0.0, "nothing moves")
    for nbytes, bytes_per_s, verb, where in candidates:
        most = int(nbytes.argmax())
        if bytes_per_s and nbytes[most] / bytes_per_s > worst.seconds:
            cause = f"{subject} {most} {verb} {units.gb(int(nbytes[most]))} {where} at {bytes_per_s / 1e9:g} GB/s"
            worst = Bound(cluster.name, float(nbytes[most] / bytes_per_s), cause)
    return worst


def _busiest(nbytes: Mapping[int, int], direction: Literal["sends", "receives"]) -> BusiestRank:
    rank = max(nbytes, key=lambda rank: (nbytes[rank], -rank))
    return BusiestRank(rank, nbytes[rank], direction)
