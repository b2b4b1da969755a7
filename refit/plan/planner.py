"""How a transfer is found.

1. Match the tensors of both sides by key (`match_tensors`).
2. For each destination rank, cover every box it holds with boxes the source holds (`overlaps`).
3. A piece that the rank holds itself is a local copy; else a replica on its own node is preferred (`nearest`).
   One that a single rank can send comes from there; of several replicas the least loaded sends it (`choose_senders`).
4. Pieces of one tensor that the same pair exchanges and that touch become one transfer.

Pure and deterministic: every rank that plans the same two shardings gets the same plan, so nobody has to communicate.
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
"""Replicated pieces are cut no smaller than this for the sake of balance: more operations would cost more than it
gains."""

IMBALANCE = 0.01
"""Replicated pieces are cut to this share of a mean sender's bytes, which bounds how uneven the senders can end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a destination's box and the source ranks it may come from; none of them: written as zeros."""

    box: Box
    holders: tuple[int, ...]
    destination: int


@dataclass(frozen=True, slots=True)
class Replicated:
    """A piece of tensor number `tensor` that several ranks may send, `nbytes` long."""

    tensor: int
    piece: Piece
    nbytes: int


def plan_refit(source: Sharding, destination: Sharding, *, ranks_per_node: int | None = None) -> RefitPlan:
    """Plan how every box of `destination` is filled from `source`.

    With `ranks_per_node` a replica on the destination's own node is preferred to a remote one.
    Raises PlanError where the sides do not hold the same tensors or some element has no source.
    """
    match_tensors(source, destination)
    rows: list[tuple[int, int, int, Box]] = []
    replicated: list[Replicated] = []
    load = dict.fromkeys(source.ranks, 0)
    covers: dict[tuple[int, int], list[Piece]] = {}  # layers of a kind share their spreads
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
    """Check that every destination tensor has a source of the same shape.

    Source tensors without a destination are an error too: weights left behind mean two different models. Where the
    first dim is padded (vocabulary), only the others must agree.
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
    """Cover each destination rank's boxes with source boxes, those the rank holds itself first.

    Padding rows that no source holds become pieces without holders; anything else uncovered raises PlanError.
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
    """Each destination holding with the source holdings that share elements with it, found for all sources at once."""
    offsets = np.array([held.box.offsets for held in source.shards])
    ends = np.array([held.box.ends for held in source.shards])
    for wanted in destination.shards:
        shared = ((offsets < wanted.box.ends) & (ends > wanted.box.offsets)).all(axis=1)
        yield wanted, [source.shards[index] for index in np.flatnonzero(shared).tolist()]


def nearest(piece: Piece, ranks_per_node: int | None) -> Piece:
    """`piece` with only the holders worth asking: the destination itself, else those on its node, else all.

    A replica on the destination's node is taken however loaded it is: it has at most `ranks_per_node - 1` neighbours to
    serve, over links at least that many times as fast as a rank's share of the network on 8-GPU hosts, so it is done
    no later than they would be with the same bytes from other nodes.
    A local copy never becomes a transfer: that adds to what two ranks send and receive and takes from none.
    """
    if piece.destination in piece.holders:
        return Piece(piece.box, (piece.destination,), piece.destination)
    if ranks_per_node is None:
        return piece
    node = piece.destination // ranks_per_node
    near = tuple(rank for rank in piece.holders if rank // ranks_per_node == node)
    return Piece(piece.box, near or piece.holders, piece.destination)


def choose_senders(replicated: Sequence[Replicated], load: dict[int, int]) -> list[tuple[int, int, int, Box]]:
    """Give each piece to its least loaded holder; `load`, bytes each rank sends already, is updated.

    Pieces with the fewest holders go first, since those with more can still fill what they leave uneven, and largest
    first among them (LPT, Graham 1969). Ties go to the holder that stands first in its side's rank order, never to the
    smaller number: renaming ranks renames the plan and changes nothing else.
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
    """Join touching boxes that share tensor, source and destination. Moves the same elements in fewer transfers."""
    boxes: dict[tuple[int, int, int], list[Box]] = defaultdict(list)
    for tensor, sender, receiver, box in rows:
        boxes[tensor, sender, receiver].append(box)
    return [(*route, box) for route, parts in boxes.items() for box in (coalesce(parts) if len(parts) > 1 else parts)]
