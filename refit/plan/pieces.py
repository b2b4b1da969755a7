"""The pieces of a transfer: which parts of the destination's boxes which source ranks may send.

Six rows from TP2 on ranks 0 and 1 to TP3 on ranks 2 to 4:

    row              0     1     2     3     4     5
    cells          [     rank 0     ][     rank 1     ]      what the same source ranks hold
    destination    [  rank 2  ][  rank 3  ][  rank 4  ]
    parts          [    a     ][ b  ][ c  ][    d     ]      one destination box in one cell
    pieces         a for 2 and b for 3, both from {0}; c for 3 and d for 4, both from {1}

With the same rows on rank 5 too, a and b would be from {0, 5}: `senders` decides which of the two sends how much. With
the destination's first two rows on rank 6 as well, there would be one more piece: a for 6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refit.errors import PlanError
from refit.plan.box import Box
from refit.plan.box_array import BoxArray, Boxes, Column, Grouped, IntArray, RepeatedBoxes, numbered, ranges, touching
from refit.plan.sharding import TensorSharding, holders_of
from refit.plan.tensor_class import TensorClass

ZEROS = -1
"""In place of a source rank: the destination zeroes vocabulary padding that the source does not have."""

NO_CELL = -1
"""The cell of such padding."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Piece `i` is `boxes[i]` of class `tensor_class[i]`, needed on rank `destination[i]`.

    The ranks of `holder_sets[holders[i]]` may send it, whole or in parts. Pieces of the set (ZEROS,) are zeroed.
    Shapes: columns `[num_pieces]`; dim 0 of a box counts the tensors of its class, and all have `max_dims` dims, as in
    RefitPlan.
    """

    tensor_class: Column
    destination: Column
    holders: Column
    boxes: RepeatedBoxes
    holder_sets: tuple[tuple[int, ...], ...]


def find_pieces(classes: Sequence[TensorClass], ranks_per_node: int | None) -> Pieces:
    """Cover the boxes of every destination rank with boxes of the source, each with the ranks that may send it.

    A rank that holds a piece itself copies it: a transfer adds load to two ranks and relieves none. Otherwise, with
    `ranks_per_node`, replicas on its node may send it, whatever their load, and all replicas where its node has none. A
    replica serves at most `ranks_per_node - 1` neighbours. On 8-GPU hosts its links are at least that many times as
    fast as a rank's share of the network, so it finishes no later than its neighbours would with the same bytes from
    other nodes.

    Padding rows that no source holds are zeroed. Raises PlanError where other elements lack a source.
    """
    sets, dims = _HolderSets(), max((each.dims for each in classes), default=1)
    pieces = [_pieces_of(each, sets, ranks_per_node) for each in classes]
    boxes = [
        RepeatedBoxes(_with_tensors(found.boxes.distinct, each, dims), found.boxes.number)
        for found, each in zip(pieces, classes, strict=True)
    ]
    return Pieces(
        np.repeat(np.arange(len(classes), dtype=np.int32), [len(found.boxes) for found in pieces]),
        np.concatenate([found.rank for found in pieces]),
        np.concatenate([found.holders for found in pieces]),
        RepeatedBoxes.concatenated(boxes),
        tuple(sets.ranks),
    )


@dataclass(frozen=True, slots=True)
class _HolderSets:
    """Numbers the sets of ranks that hold something. What the same ranks hold has the same number in all classes."""

    ranks: list[tuple[int, ...]] = field(default_factory=list)
    _numbers: dict[tuple[int, ...], int] = field(default_factory=dict)

    def number(self, ranks: tuple[int, ...]) -> int:
        number = self._numbers.setdefault(ranks, len(self.ranks))
        if number == len(self.ranks):
            self.ranks.append(ranks)
        return number


@dataclass(frozen=True, slots=True)
class _ClassPieces:
    """Pieces of one class, as columns. `holders` are numbers of `_HolderSets`."""

    boxes: Boxes
    rank: Column
    holders: Column


def _pieces_of(tensors: TensorClass, sets: _HolderSets, ranks_per_node: int | None) -> _ClassPieces:
    cells, wanted = cells_of(tensors.source), tensors.destination
    parts = _parts(tensors, cells.boxes)
    # Every rank that holds a destination box needs all of its parts: a join of holders and parts over the box. Parts
    # are sorted by it, so those of one box are the rows first, first + 1, ... of `parts`. In the module's example each
    # box has one holder: of = [0, 1, 1, 2], first = [0, 1, 3], counts = [1, 2, 1].
    first = np.searchsorted(parts.of, wanted.holders.box)
    counts = np.searchsorted(parts.of, wanted.holders.box, side="right") - first
    part, rank = ranges(first, counts), np.repeat(wanted.holders.rank, counts)
    holders = _preferred(cells, parts.cell[part], rank, sets, ranks_per_node)
    if cells.are_cut:
        return _merged(_ClassPieces(parts.boxes[part], rank, holders), parts.of[part])
    boxes = RepeatedBoxes(parts.boxes, part.astype(np.int32))
    return _ClassPieces(boxes, rank.astype(np.int32), holders.astype(np.int32))


def _merged(pieces: _ClassPieces, of: IntArray) -> _ClassPieces:
    """Merge pieces of one box that the same ranks may send to one rank: it needs a box whole that others hold parts of.

    `of` has each piece's box: a rank may need two that touch, where more is delivered in a later stage.
    """
    num_ranks, num_boxes = 1 + int(pieces.rank.max(initial=0)), 1 + int(of.max(initial=0))
    merged = Grouped((pieces.holders * num_ranks + pieces.rank) * num_boxes + of, pieces.boxes.expanded).merged()
    # In an order that does not depend on the numbers of ranks.
    order = np.lexsort(merged.boxes.offsets.T) if merged.boxes.dims else np.arange(len(merged.groups))
    holders, rank = np.divmod(merged.groups[order] // num_boxes, num_ranks)
    return _ClassPieces(merged.boxes[order], rank.astype(np.int32), holders.astype(np.int32))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Disjoint parts of the destination's boxes: part `i` lies in box `of[i]`, which ascends, and in `cell[i]`."""

    boxes: BoxArray
    of: IntArray
    cell: IntArray


def _parts(tensors: TensorClass, cells: BoxArray) -> _Parts:
    """What the destination's boxes share with the source's cells, and the padding that they share with none."""
    wanted = tensors.destination.boxes
    of, cell = touching(wanted, cells)
    boxes = wanted[of].intersect(cells[cell])
    # Cells are disjoint, and so are a box's parts: their volumes say whether something of it is missing.
    covered = np.zeros(len(wanted), np.int64)
    np.add.at(covered, of, boxes.volumes)
    holes = []
    for index in np.flatnonzero(covered < wanted.volumes).tolist():
        rest = [wanted.box(index)]
        for part in np.flatnonzero(of == index).tolist():
            rest = [left for hole in rest for left in hole.subtract(boxes.box(part))]
        holes += [(index, hole) for hole in rest]
    if not holes:
        return _Parts(boxes, of, cell)
    if not tensors.padded:
        index, hole = holes[0]
        rank = tensors.destination.shards[index].ranks[0]
        raise PlanError(f"{tensors.tensors[0].key}: no source holds {hole} that rank {rank} needs")
    boxes = boxes.joined(BoxArray.of([hole for _, hole in holes], wanted.dims))
    of = np.append(of, [index for index, _ in holes])
    order = np.argsort(of, kind="stable")
    return _Parts(boxes[order], of[order], np.append(cell, [NO_CELL] * len(holes))[order])


@dataclass(frozen=True, slots=True)
class Cells:
    """Disjoint boxes that cover what a source holds, and the ranks that hold each.

    `are_cut`: the source's own boxes overlap, so cells are parts of them.
    """

    boxes: BoxArray
    ranks: tuple[tuple[int, ...], ...]
    are_cut: bool


def cells_of(source: TensorSharding) -> Cells:
    """The source's boxes; where they overlap, cut so that all elements of a cell are held by the same ranks.

    row        0     1     2     3     4     5
    rank 0   [           A            ]
    rank 1               [           B            ]
    cells    [   {0}    ][  {0, 1}   ][    {1}    ]
    """
    # Boxes of a side are distinct, so each touches itself, and more pairs than that mean an overlap.
    itself, _ = touching(source.boxes, source.boxes)
    if len(itself) == len(source.shards):
        return Cells(source.boxes, tuple(shard.ranks for shard in source.shards), are_cut=False)
    cells: list[tuple[Box, tuple[int, ...]]] = []
    for shard in source.shards:
        rest, cut = [shard.box], []
        for box, ranks in cells:
            common = box.intersect(shard.box)
            if common is None:
                cut.append((box, ranks))
                continue
            cut += [(common, (*ranks, *shard.ranks)), *((part, ranks) for part in box.subtract(common))]
            rest = [part for each in rest for part in each.subtract(common)]
        cells = cut + [(part, shard.ranks) for part in rest]
    boxes = BoxArray.of([box for box, _ in cells], source.boxes.dims)
    return Cells(boxes, tuple(ranks for _, ranks in cells), are_cut=True)


def _preferred(cells: Cells, cell: IntArray, rank: IntArray, sets: _HolderSets, ranks_per_node: int | None) -> IntArray:
    """For each row, the number of the set of ranks that may send `cell[row]` to `rank[row]`, `[num_rows]`.

    Rows that share cell and scope share their set, which is looked up once. Eight ranks on two nodes, a cell that 0, 1
    and 5 hold, and what each rank may get it from:

        rank       0      1      2        3        4     5      6     7
        scope      0      1      8 + 0    8 + 0    8+1   5      8+1   8+1      rank, or num_ranks + node; 16 is anyone
        set       {0}    {1}   {0, 1}   {0, 1}    {5}   {5}    {5}   {5}
    """
    holders = holders_of(cells.ranks)
    num_ranks = 1 + max(int(rank.max(initial=0)), int(holders.rank.max(initial=0)))
    # A rank that holds the cell itself has scope `rank`, one with a replica on its node `num_ranks + node`.
    scope = np.full(len(rank), 2 * num_ranks)
    if ranks_per_node is not None:
        node = rank // ranks_per_node
        near = np.isin(cell * num_ranks + node, holders.box * num_ranks + holders.rank // ranks_per_node)
        scope[near] = num_ranks + node[near]
    own = np.isin(cell * num_ranks + rank, holders.box * num_ranks + holders.rank)
    scope[own] = rank[own]
    # One number per (cell, scope). NO_CELL is -1, so cells count from 1 in it, and `divmod` below gives both back.
    scopes = 2 * num_ranks + 1
    keys, first, rows = numbered((cell + 1) * scopes + scope, (len(cells.ranks) + 1) * scopes)
    by_node: dict[int, dict[int, tuple[int, ...]]] = {}

    def ranks_of(cell: int, scope: int) -> tuple[int, ...]:
        if scope < num_ranks:
            return (scope,)
        if scope == 2 * num_ranks:
            return (ZEROS,) if cell == NO_CELL else cells.ranks[cell]
        assert ranks_per_node is not None
        if cell not in by_node:
            by_node[cell] = grouped_by_node(cells.ranks[cell], ranks_per_node)
        return by_node[cell][scope - num_ranks]

    numbers = np.zeros(len(keys), np.int64)
    for index in np.argsort(first).tolist():  # in the order of the rows, whatever the ranks' numbers
        place, which = divmod(int(keys[index]), scopes)
        numbers[index] = sets.number(ranks_of(place - 1, which))
    return numbers[rows]


def grouped_by_node(ranks: tuple[int, ...], ranks_per_node: int) -> dict[int, tuple[int, ...]]:
    grouped: dict[int, list[int]] = defaultdict(list)
    for rank in ranks:
        grouped[rank // ranks_per_node].append(rank)
    return {node: tuple(near) for node, near in grouped.items()}


def _with_tensors(boxes: BoxArray, tensors: TensorClass, dims: int) -> BoxArray:
    """`boxes` of one tensor as boxes of all tensors of the class, with `dims` dims."""
    shape = (len(boxes), dims)
    offsets, ends = np.zeros(shape, np.int64), np.ones(shape, np.int64)
    ends[:, 0] = len(tensors.tensors)
    offsets[:, 1 : tensors.dims], ends[:, 1 : tensors.dims] = boxes.offsets, boxes.ends
    return BoxArray(offsets, ends)
