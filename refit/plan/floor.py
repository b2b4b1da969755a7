"""The floor under all plans: what no plan can beat, however many ranks pass a byte on.

A plan's lower bound (`cost.lower_bound`) counts the bytes of its own routes. The floor counts only what every plan has
to do: to each node that lacks it, an element crosses once; from the ranks that hold it at the source, it leaves once;
and each rank receives what it lacks itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from refit import units
from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.plan.cost import Bound
from refit.plan.needs import needs
from refit.plan.sharding import Sharding


@dataclass(frozen=True, slots=True)
class LeastBytes:
    """Bytes that every plan moves.

    `into` each node, those of distinct elements that it lacks. `out_of` the ranks that are the holders of elements that
    other nodes lack, once for all of these. `received` are those that each rank lacks. Padding, which no rank holds, is
    left out of all.
    """

    into: Mapping[int, int]
    out_of: Mapping[tuple[int, ...], int]
    received: Mapping[int, int]

    @property
    def between(self) -> int:
        """What crosses between nodes at least."""
        return sum(self.into.values())


def least_bytes(source: Sharding, destination: Sharding, ranks_per_node: int) -> LeastBytes:
    """What every plan between two sides of the same tensors moves."""
    received: dict[int, int] = defaultdict(int)
    into: dict[int, int] = defaultdict(int)
    out_of: dict[tuple[int, ...], int] = defaultdict(int)
    for need in needs(source, destination, ranks_per_node):
        far, itemsizes = need.far, need.nbytes // need.box.volume
        held, members = 0, {rank for ranks in need.by_node.values() for rank in ranks}
        for part in need.parts:
            nbytes = part.box.volume * itemsizes
            held += nbytes
            for rank in members.intersection(part.ranks):
                received[rank] -= nbytes
            if far:
                out_of[part.ranks] += nbytes
        for rank in members:
            received[rank] += held
        for node in far:
            into[node] += held
    lacking = {rank: nbytes for rank, nbytes in sorted(received.items()) if nbytes}
    return LeastBytes({node: nbytes for node, nbytes in into.items() if nbytes}, dict(out_of), lacking)


def floor_of(least: LeastBytes, cluster: Cluster, ranks_per_node: int, gpus: GpuMap | None = None) -> Bound | None:
    """The longest time that any node, or any rank, needs for what every plan has it do, on all its links at once.

    A rank gets what it lacks over both its links. A GPU that ranks share has one link of either kind. None where bytes
    cross nodes and the cluster states no speed for that.
    """
    speed, received = cluster.inter_bytes_per_s, least.received
    if speed is None:
        return None if least.between else _slowest_rank(received, cluster, cluster.intra_bytes_per_s, gpus)
    gpu_of = (lambda rank: rank) if gpus is None else gpus.gpu_of
    members: dict[int, set[int]] = defaultdict(set)
    for rank in {*received, *(rank for ranks in least.out_of for rank in ranks)}:
        members[rank // ranks_per_node].add(gpu_of(rank))
    worst = _slowest_rank(received, cluster, speed + cluster.intra_bytes_per_s, gpus)
    for node, nbytes in least.into.items():
        worst = _later(worst, nbytes, len(members[node]) * speed, f"node {node} receives", cluster)
    sole: dict[int, int] = defaultdict(int)  # by GPU
    node_alone: dict[int, int] = defaultdict(int)
    for ranks, nbytes in least.out_of.items():
        if len(holders := {gpu_of(rank) for rank in ranks}) == 1:
            sole[holders.pop()] += nbytes
        if len(on := {rank // ranks_per_node for rank in ranks}) == 1:
            node_alone[on.pop()] += nbytes
    for gpu, nbytes in sole.items():
        worst = _later(worst, nbytes, speed, f"{_subject(gpus)} {gpu}, the only one that holds them, sends", cluster)
    for node, nbytes in node_alone.items():
        worst = _later(worst, nbytes, len(members[node]) * speed, f"node {node} sends", cluster)
    senders = {gpu_of(rank) for ranks in least.out_of for rank in ranks}
    total = sum(least.out_of.values())
    return _later(worst, total, max(1, len(senders)) * speed, "the source sends", cluster)


def _slowest_rank(received: Mapping[int, int], cluster: Cluster, speed: float, gpus: GpuMap | None) -> Bound:
    worst = Bound(cluster.name, 0.0, "nothing moves")
    if gpus is not None and gpus.is_shared:  # what ranks of one GPU send each other crosses no link
        return worst
    for rank, nbytes in received.items():
        worst = _later(worst, nbytes, speed, f"rank {rank} receives", cluster)
    return worst


def _later(worst: Bound, nbytes: int, speed: float, what: str, cluster: Cluster) -> Bound:
    if nbytes / speed <= worst.seconds:
        return worst
    return Bound(cluster.name, nbytes / speed, f"{what} {units.gb(nbytes)} at {speed / 1e9:g} GB/s")


def _subject(gpus: GpuMap | None) -> str:
    return "GPU" if gpus is not None and gpus.is_shared else "rank"
