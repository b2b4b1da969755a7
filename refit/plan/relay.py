"""Relays: what a refit delivers first, and to whom, so that each byte crosses to a node once (`plan_refit`'s `via`).

A box that four ranks need, two on each of the nodes A and B, in parts p to s:

                  node A: ranks 2, 3      node B: ranks 4, 5
    NODE
    S_1           p q        r s          p q        r s       each node gets every part once, over all its links
    destination   p q r s    p q r s      p q r s    p q r s   and its ranks exchange them
    ENGINE
    S_1           p          q            r          s         the source sends every part once
    S_2           p r        q s          p r        q s       the nodes exchange them, each part once to each node
    destination   p q r s    p q r s      p q r s    p q r s

With k engines on nodes of their own, ENGINE has the source send one copy in place of k, and every link works from the
first messages on. A chain of engines would take k stages.

Parts are the same on all nodes, so that boxes of what is delivered are equal or disjoint.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from refit.config.relay import Relay
from refit.plan.box import Box
from refit.plan.needs import Need, kinds, needs
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding

MIN_PART_BYTES = 64 << 10
"""A box of one tensor is not cut into smaller parts: more operations cost more than balance gains."""

MAX_NODE_PARTS = 16
"""Most nodes over which ENGINE divides a box. More would gain little."""

MAX_NODE_PAIRS = 512
"""About the most pairs of nodes between which a box goes with ENGINE: each costs a route."""

ROWS = 128
"""Parts begin at multiples of this where they have several: blocks of FP8 codes then stay whole."""

Choice = Callable[[ReplicatedShard], Collection[int]]
"""Of a box and the ranks that hold it, those that get it first: at least one of them."""


def relay_stages(source: Sharding, destination: Sharding, relay: Relay, ranks_per_node: int) -> list[Sharding]:
    """What is delivered after each stage but the last, with `relay`: OFF, NODE or ENGINE.

    Empty where nothing is to be passed on: no box is needed by several ranks of a node (ENGINE: or by several nodes)
    that does not hold it already. Both sides hold the same tensors.
    """
    if relay is Relay.OFF:
        return []
    relays = _Relays(source, destination, ranks_per_node, MAX_NODE_PARTS if relay is Relay.ENGINE else 1)
    once = relays.delivered(once_in_all=False)
    stages = [relays.delivered(once_in_all=True), once, destination] if relay is Relay.ENGINE else [once, destination]
    return [stage for stage, after in itertools.pairwise(stages) if not _is_same(stage, after)]


def _is_same(stage: Sharding, after: Sharding) -> bool:
    """Whether every rank has as much after both. What is delivered only grows."""
    return stage.bytes_per_rank == after.bytes_per_rank


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a box, and who gets it first: `owner` on each node, or several ranks, where they need no relay.

    `first` is the node that gets it from the source where it is sent once in all; None: every node does.
    """

    box: Box
    owners: dict[int, tuple[int, ...]] = field(default_factory=dict)
    first: int | None = None

    def ranks(self, once_in_all: bool, near: Collection[int]) -> list[int]:
        nodes = [self.first, *near] if once_in_all and self.first is not None else self.owners
        return [rank for node in self.owners if node in nodes for rank in self.owners[node]]


class _Relays:
    """Divides the boxes of a destination over the ranks that need them: of a node, and of up to `most_nodes` nodes."""

    def __init__(self, source: Sharding, destination: Sharding, ranks_per_node: int, most_nodes: int) -> None:
        self._destination = destination
        self._most_nodes = most_nodes
        self._kind = kinds(source, destination)
        self._passed_on: dict[int, int] = defaultdict(int)  # between nodes, by the node that sends
        self._load = np.zeros(1 + max(destination.ranks, default=0), np.int64)
        self._parts: dict[tuple[int, int], list[tuple[Need, _Part]]] = defaultdict(list)
        # What there is a choice for comes last, and the largest first, so that small boxes even out the rest.
        for need in sorted(
            needs(source, destination, ranks_per_node),
            key=lambda need: (max(map(len, need.by_node.values())) > 1, -need.nbytes),
        ):
            self._divide(need)

    def _divide(self, need: Need) -> None:
        far = need.far
        over = min(len(far), self._most_nodes, max(1, MAX_NODE_PAIRS // max(1, len(far))))
        most = max((len(need.by_node[node]) for node in far), default=1)
        boxes = _cut(need.box, min(most * max(1, over), max(1, need.tensor_bytes // MIN_PART_BYTES)))
        # With fewer parts than nodes, boxes begin with different nodes, those that pass on least.
        first = sorted(far, key=lambda node: self._passed_on[node])[:over]
        for number, box in enumerate(boxes):
            part = _Part(box, dict(need.by_node), first[number % over] if over > 1 else None)
            nbytes = need.nbytes * box.volume // need.box.volume
            if part.first is not None:
                self._passed_on[part.first] += nbytes * (len(far) - 1)
            for node in far:
                members = need.by_node[node]
                owner = members[int(self._load[list(members)].argmin())]
                self._load[owner] += nbytes
                part.owners[node] = (owner,)
            self._parts[need.kind].append((need, part))

    def delivered(self, *, once_in_all: bool) -> Sharding:
        """What ranks have of the destination once every part is on each node, or on one (`once_in_all`)."""
        made = {
            kind: TensorSharding(
                tuple(ReplicatedShard(part.box, tuple(part.ranks(once_in_all, need.near))) for need, part in parts)
            )
            for kind, parts in self._parts.items()
        }
        by_key = {key: made[kind] for key, kind in self._kind.items()}
        return Sharding(self._destination.ranks, self._destination.tensors, by_key)


def _cut(box: Box, parts: int) -> list[Box]:
    """`box` in at most `parts` nearly equal parts along its leading dim, which begin at multiples of ROWS if they
    can."""
    dim = box.leading_dim
    if dim is None or parts <= 1:
        return [box]
    size, begin = box.extents[dim], box.offsets[dim]
    parts, step = min(parts, size), ROWS if size >= 2 * ROWS * parts else 1
    cuts = [begin, *(_nearest(begin + size * part // parts, step) for part in range(1, parts)), begin + size]
    return [box.narrow(dim, first, last) for first, last in itertools.pairwise(cuts)]


def _nearest(number: int, step: int) -> int:
    return (number + step // 2) // step * step


def first_holders(source: Sharding, destination: Sharding, choose: Choice) -> Sharding:
    """`destination` with each box on the ranks of `choose` only, and on those that have it at the source already.

    The latter copy it, which costs no link anything; otherwise they would get it passed on. Both sides hold the same
    tensors.
    """
    # Layers of one kind share one object on either side, and here too.
    made: dict[tuple[int, int], TensorSharding] = {}
    by_key: dict[str, TensorSharding] = {}
    for key, wanted in destination.by_key.items():
        kind = (id(source.by_key[key]), id(wanted))
        if kind not in made:
            made[kind] = _restricted(source.by_key[key], wanted, choose)
        by_key[key] = made[kind]
    return Sharding(destination.ranks, destination.tensors, by_key)


def _restricted(source: TensorSharding, destination: TensorSharding, choose: Choice) -> TensorSharding:
    shards = []
    for shard in destination.shards:
        first = {*choose(shard), *_at_home(source, shard)}
        shards.append(ReplicatedShard(shard.box, tuple(rank for rank in shard.ranks if rank in first)))
    return TensorSharding(tuple(shards))


def _at_home(source: TensorSharding, shard: ReplicatedShard) -> set[int]:
    """The ranks of `shard` that hold its box at the source."""
    holders = {rank for held in source.shards if held.box.contains(shard.box) for rank in held.ranks}
    return holders & set(shard.ranks)
