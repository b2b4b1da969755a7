"""Needs: what the nodes of a destination need, and which of them hold it at the source already.

Relays (`relay`) and the floor under all plans (`floor`) start from these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from refit.plan.box import Box
from refit.plan.box_array import touching
from refit.plan.pieces import cells_of, grouped_by_node
from refit.plan.sharding import Sharding, TensorSharding

Kind = tuple[int, int]
"""The shardings of a tensor on both sides, by their ids: layers of one kind share them."""


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a box and the ranks that hold it at the source, with their nodes."""

    box: Box
    ranks: tuple[int, ...]
    nodes: frozenset[int]


@dataclass(frozen=True, slots=True)
class Need:
    """A box that the ranks of `by_node` need, of all tensors of one kind: `nbytes` together, `tensor_bytes` of one.

    `near` are the nodes that hold all of it at the source; the other nodes hold nothing of it. `parts` are what the
    source holds: all of the box, but for padding.
    """

    kind: Kind
    box: Box
    by_node: dict[int, tuple[int, ...]]
    near: frozenset[int]
    parts: tuple[Held, ...]
    nbytes: int
    tensor_bytes: int

    @property
    def far(self) -> list[int]:
        """The nodes to which it has to cross."""
        return [node for node in self.by_node if node not in self.near]


def kinds(source: Sharding, destination: Sharding) -> dict[str, Kind]:
    """The kind of each tensor, by its key."""
    return {key: (id(source.by_key[key]), id(wanted)) for key, wanted in destination.by_key.items()}


def needs(source: Sharding, destination: Sharding, ranks_per_node: int) -> Iterator[Need]:
    """What `destination` needs, in disjoint boxes: all ranks that need an element of a box need all of it.

    Both sides hold the same tensors.
    """
    keys: dict[Kind, list[str]] = defaultdict(list)
    for key, kind in kinds(source, destination).items():
        keys[kind].append(key)
    for kind, alike in keys.items():
        sizes = [destination.tensors[key].itemsize for key in alike]
        for box, by_node, near, parts in _boxes(source.by_key[alike[0]], destination.by_key[alike[0]], ranks_per_node):
            yield Need(kind, box, by_node, near, parts, box.volume * sum(sizes), box.volume * max(sizes))


def _boxes(
    source: TensorSharding, destination: TensorSharding, ranks_per_node: int
) -> Iterator[tuple[Box, dict[int, tuple[int, ...]], frozenset[int], tuple[Held, ...]]]:
    """The fields of `Need` that do not depend on the size of an element."""
    cells, held = cells_of(destination), cells_of(source)
    nodes = [frozenset(rank // ranks_per_node for rank in ranks) for ranks in held.ranks]
    parts: dict[int, list[Held]] = defaultdict(list)
    of, which = touching(cells.boxes, held.boxes)
    common = cells.boxes[of].intersect(held.boxes[which])
    for row, (cell, other) in enumerate(zip(of.tolist(), which.tolist(), strict=True)):
        parts[cell].append(Held(common.box(row), held.ranks[other], nodes[other]))
    for number, ranks in enumerate(cells.ranks):
        by_node = grouped_by_node(ranks, ranks_per_node)
        for box, near, of_box in _near_or_far(cells.boxes.box(number), parts[number], by_node.keys()):
            yield box, by_node, near, of_box


def _near_or_far(
    box: Box, parts: Sequence[Held], nodes: Collection[int]
) -> Iterator[tuple[Box, frozenset[int], tuple[Held, ...]]]:
    """`box` with those of `nodes` that hold all of it; in parts where a node holds some of it only."""
    held = dict.fromkeys(nodes, 0)
    for part in parts:
        for node in part.nodes & held.keys():
            held[node] += part.box.volume
    if all(volume in (0, box.volume) for volume in held.values()):
        yield box, frozenset(node for node, volume in held.items() if volume), tuple(parts)
        return
    rest = [box]
    for part in parts:
        yield part.box, part.nodes & frozenset(nodes), (part,)
        rest = [left for each in rest for left in each.subtract(part.box)]
    yield from ((padding, frozenset(), ()) for padding in rest)
