"""The planner: from two shardings to a RefitPlan.

1. Match the tensors of both sides by key (`match_tensors`).
2. Cover every box of every destination rank with boxes that the source holds (`overlaps`).
3. Choose the sender of each piece. A piece that the destination rank holds itself is a local copy. Otherwise replicas
   on its node are preferred (`nearest`), and among several replicas the least loaded rank sends (`choose_senders`).
4. Merge pieces of one tensor that touch and that the same pair exchanges into one transfer (`merge`).

Pure and deterministic: all ranks compute the same plan from the same shardings, without communication.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refit.errors import PlanError
from refit.plan.box import Box, coalesce
from refit.plan.plan import ZEROS, RefitPlan
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec

MIN_SPLIT_BYTES = 1 << 20
"""Replicated pieces are not cut smaller than this: the cost of more operations would exceed the gain in balance."""

IMBALANCE = 0.01
"""Replicated pieces are cut to this share of the mean bytes per sender, which bounds the imbalance of the senders."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a box of rank `destination` and the source ranks that hold it. Without holders it is zeroed."""

    box: Box
    holders: tuple[int, ...]
    destination: int


@dataclass(frozen=True, slots=True)
class Replicated:
    """A piece that several ranks hold. `tensor` is the index of its tensor."""

    tensor: int
    piece: Piece
    nbytes: int


def plan_refit(source: Sharding, destination: Sharding, *, ranks_per_node: int | None = None) -> RefitPlan:
    """Plan how every box of `destination` is filled from `source`.

    With `ranks_per_node`, replicas on the destination's node are preferred to remote ones.
    Raises PlanError where the sides do not hold the same tensors, or an element has no source.
    """
    match_tensors(source, destination)
    rows: list[tuple[int, int, int, Box]] = []
    replicated: list[Replicated] = []
    load = dict.fromkeys(source.ranks, 0)
    covers: dict[tuple[int, int], list[Piece]] = {}  # by identity: layers of one kind share their TensorSharding
    for index, (key, tensor) in enumerate(destination.tensors.items()):
        by_key = (source.by_key[key], destination.by_key[key])
        memo = (id(by_key[0]), id(by_key[1]))
        if memo not in covers:
            covers[memo] = [nearest(piece, ranks_per_node) for piece in overlaps(*by_key, tensor)]
        for piece in covers[memo]:
            nbytes = piece.box.volume * tensor.itemsize
            if len(piece.holders) > 1:
                replicated.append(Replicated(index, piece, nbytes))
                continue
            sender = piece.holders[0] if piece.holders else ZEROS
            rows.append((index, sender, piece.destination, piece.box))
            if sender not in (ZEROS, piece.destination):
                load[sender] += nbytes
    rows += choose_senders(replicated, load)
    return RefitPlan.from_rows(source, destination, merge(rows))


def match_tensors(source: Sharding, destination: Sharding) -> None:
    """Check that both sides hold the same tensors with the same shapes.

    Dim 0 of a padded tensor (vocabulary) may differ. Raises PlanError, also for source tensors without a destination:
    subset refits are not supported.
    """
    missing = sorted(destination.tensors.keys() - source.tensors.keys())
    surplus = sorted(source.tensors.keys() - destination.tensors.keys())
    if missing or surplus:
        raise PlanError(
            f"the two models differ: {len(missing)} tensors only at the destination {missing[:3]}, "
            f"{len(surplus)} only at the source {surplus[:3]}"
        )
    for key, wanted in destination.tensors.items():
        held = source.tensors[key]
        free = 1 if wanted.padded and held.padded else 0
        if len(held.shape) != len(wanted.shape) or held.shape[free:] != wanted.shape[free:]:
            raise PlanError(f"{key}: shape {list(held.shape)} at the source, {list(wanted.shape)} at the destination")


def overlaps(source: TensorSharding, destination: TensorSharding, tensor: TensorSpec) -> list[Piece]:
    """Cover the boxes of each destination rank with source boxes. Boxes that the rank holds itself come first.

    Padding rows that no source holds become pieces without holders. Raises PlanError where other elements lack a
    source.
    """
    pieces: list[Piece] = []
    for wanted, touching in _touching(source, destination):
        for rank in wanted.ranks:
            missing = [wanted.box]
            for held in sorted(touching, key=lambda shard: rank not in shard.ranks):
                if not missing:
                    break
                found = [part for hole in missing if (part := hole.intersect(held.box)) is not None]
                if found:
                    pieces += (Piece(part, held.ranks, rank) for part in found)
                    missing = [rest for hole in missing for rest in hole.subtract(held.box)]
            if missing and not tensor.padded:
                raise PlanError(f"{tensor.key}: no source holds {missing[0]} that rank {rank} needs")
            pieces += (Piece(hole, (), rank) for hole in missing)
    return pieces


def _touching(
    source: TensorSharding, destination: TensorSharding
) -> Iterator[tuple[ReplicatedShard, list[ReplicatedShard]]]:
    """Each destination shard with the source shards that share elements with it."""
    offsets = np.array([held.box.offsets for held in source.shards])
    ends = np.array([held.box.ends for held in source.shards])
    for wanted in destination.shards:
        shared = ((offsets < wanted.box.ends) & (ends > wanted.box.offsets)).all(axis=1)
        yield wanted, [source.shards[index] for index in np.flatnonzero(shared).tolist()]


def nearest(piece: Piece, ranks_per_node: int | None) -> Piece:
    """`piece` with only its preferred holders: the destination itself, else those on its node, else all.

    A replica on the destination's node is preferred whatever its load. It serves at most `ranks_per_node - 1`
    neighbours. On 8-GPU hosts its links are at least that many times as fast as a rank's share of the network, so it
    finishes no later than its neighbours would with the same bytes from other nodes.
    A local copy is never replaced by a transfer: a transfer adds load to two ranks and relieves none.
    """
    if piece.destination in piece.holders:
        return Piece(piece.box, (piece.destination,), piece.destination)
    if ranks_per_node is None:
        return piece
    node = piece.destination // ranks_per_node
    near = tuple(rank for rank in piece.holders if rank // ranks_per_node == node)
    return Piece(piece.box, near or piece.holders, piece.destination)


def choose_senders(replicated: Sequence[Replicated], load: dict[int, int]) -> list[tuple[int, int, int, Box]]:
    """Assign each piece to its least loaded holder. Updates `load`, the bytes that each rank sends already.

    Pieces with the fewest holders are assigned first, because pieces with more holders can still even out the load.
    Among those with equally many holders the largest is first (LPT, Graham 1969). Ties go to the first holder in the
    rank order of its side, not to the smallest rank number, so that renumbering the ranks only renumbers the plan.
    Returns rows (tensor index, source, destination, box).
    """
    total = sum(load.values()) + sum(item.nbytes for item in replicated)
    limit = max(MIN_SPLIT_BYTES, int(IMBALANCE * total / max(1, len(load))))
    parts = [
        (item, box, box.volume * item.nbytes // item.piece.box.volume)
        for item in replicated
        for box in item.piece.box.split(math.ceil(item.nbytes / limit))
    ]
    parts.sort(key=lambda part: (len(part[0].piece.holders), -part[2]))
    rows = []
    for item, box, nbytes in parts:
        sender = min(item.piece.holders, key=load.__getitem__)
        load[sender] += nbytes
        rows.append((item.tensor, sender, item.piece.destination, box))
    return rows


def merge(rows: Sequence[tuple[int, int, int, Box]]) -> list[tuple[int, int, int, Box]]:
    """Merge touching boxes of equal tensor, source and destination: the same elements in fewer transfers."""
    boxes: dict[tuple[int, int, int], list[Box]] = defaultdict(list)
    for tensor, sender, receiver, box in rows:
        boxes[tensor, sender, receiver].append(box)
    return [(*route, box) for route, parts in boxes.items() for box in (coalesce(parts) if len(parts) > 1 else parts)]
