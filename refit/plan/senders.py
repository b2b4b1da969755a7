"""Who sends what: the pieces that several ranks hold are shared out among them so that senders end even.

Ranks 0 and 1 hold twelve rows. Ranks 4, 5 and 6 need six, four and two of them: the pieces p0, p1 and p2 of the set
{0, 1}. Rank 0 also sends as much as two rows that only it holds, so shares of 5 and 7 make both send 7:

    line         0                             6                  10        12
    pieces       [         p0 for 4           )[      p1 for 5    )[ p2 for 6 )
    shares       [        rank 0         )[               rank 1              )
                 0                       5                                    12
    routes       p0 up to row 5 from 0, its last row from 1; p1 and p2 from 1

Rows are of megabytes here: a cut that is nearer to a piece's end than that is made at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refit.plan.box_array import BoxArray, Column, IntArray, RepeatedBoxes, numbered_by_sorting
from refit.plan.pieces import ZEROS, Pieces
from refit.plan.tensor_class import TensorClass

MIN_SPLIT_BYTES = 1 << 20
"""A cut within a tensor this near to a coarser boundary is made there: more operations cost more than balance gains."""

IMBALANCE = 0.01
"""A cut between tensors this near to a piece's end is made there, as a share of the mean bytes per sender."""

MAX_SWEEPS = 20
"""Most times that all shares are balanced."""

PRECISION = 1e-3
"""Shares are final when no rank's load changes by more than this part of the mean."""


@dataclass(frozen=True, slots=True)
class SentParts:
    """`boxes[i]`, all or a part of piece `piece[i]`, is sent by rank `source[i]`: `[num_routes]`."""

    piece: Column
    source: Column
    boxes: RepeatedBoxes


def choose_senders(
    pieces: Pieces, classes: Sequence[TensorClass], sources: Sequence[int], destinations: Sequence[int]
) -> SentParts:
    """Share out every piece among its holders. `sources` and `destinations` are the ranks of each side, in order.

    The pieces of one set of holders are laid on a line, one destination after another. Each holder sends one stretch of
    the line, as long as its share. So a rank has few peers, and few pieces are cut.

    Nothing depends on the numbers of ranks, only on their order in their side: renumbering them renumbers the routes.
    """
    # There may be millions of pieces: what counts them has 32 bits, and large arrays are dropped once they are used.
    itemsizes = np.array([each.itemsize for each in classes], np.int64)
    nbytes = pieces.boxes.volumes
    nbytes *= itemsizes[pieces.tensor_class]
    position = np.zeros(1 + max(destinations), np.int64)
    position[list(destinations)] = np.arange(len(destinations))
    sets = _beside_partners(pieces, position)
    shares = balanced(sets, pieces, nbytes, len(sources))
    # Below, the numbers of the module's example, where the line has one set: line = [0, 1, 2], starts = [0, 6, 10].
    line = _in_order(pieces.holders, position[pieces.destination])
    starts = np.cumsum(nbytes[line])
    starts -= nbytes[line]
    slack = min(MIN_SPLIT_BYTES, int(IMBALANCE * nbytes.sum() / len(sources)))
    # The sets' lines lie one behind the other, and so do the stretches of their holders: the shares [5, 7] of one set
    # end at 5 and 12, those of the next set go on from 12.
    ends = np.cumsum(np.concatenate(shares))
    on_line = line[np.searchsorted(starts, ends, side="right") - 1]
    bounds = _at_boundaries(ends, starts, pieces.boxes[on_line].extents, itemsizes[pieces.tensor_class[on_line]], slack)
    # A route begins where a piece does, at 0, 6, 10, and where a stretch does, at 5: begins = [0, 5, 6, 10]. A stretch
    # that begins with a piece adds none, and neither does the end of the line.
    inside = bounds[starts[np.searchsorted(starts, bounds, side="right") - 1] < bounds]
    added, _, _ = numbered_by_sorting(inside[inside < bounds[-1]])
    place = np.searchsorted(starts, added, side="right")
    begins = np.insert(starts, place, added)
    # The last piece that starts at or before a route is its own, [0, 0, 1, 2]. The first stretch that ends after its
    # begin says who sends it, [0, 1, 1, 1]. Empty stretches end where they begin, and are passed over.
    source = np.repeat(
        np.concatenate(sets).astype(np.int32), np.diff(np.searchsorted(begins, bounds, side="left"), prepend=0)
    )
    piece = np.insert(line, place, line[place - 1])
    lengths = np.diff(begins, append=bounds[-1])
    # lengths = [5, 1, 4, 2] of pieces of [6, 6, 4, 2]. A stretch of elements is no box in general: five rows are, five
    # rows and a half are two boxes.
    whole = lengths == nbytes[piece]
    cut = np.flatnonzero(~whole)
    size = itemsizes[pieces.tensor_class[piece[cut]]]
    first = (begins[cut] - starts[np.searchsorted(starts, begins[cut], side="right") - 1]) // size
    last = first + lengths[cut] // size
    del line, starts, begins, lengths, nbytes
    stretches = zip(cut.tolist(), first.tolist(), last.tolist(), strict=True)
    parts = [(row, box) for row, *ends in stretches for box in pieces.boxes.box(piece[row]).stretch(*ends)]
    rows = np.append(np.flatnonzero(whole), np.array([row for row, _ in parts], np.int64)).astype(np.int32)
    cuts = BoxArray.of([box for _, box in parts], pieces.boxes.dims)
    boxes = RepeatedBoxes.concatenated([pieces.boxes[piece[whole]], cuts])
    return SentParts(piece[rows], source[rows], boxes)


def _in_order(holders: Column, position: Column) -> Column:
    """The order of pieces by holders, then position, then number, `[num_pieces]`: one sort of the three as one key."""
    num = len(holders)
    keys = np.multiply(holders, 1 + int(position.max(initial=0)), dtype=np.int64)
    keys += position
    keys *= num
    keys += np.arange(num, dtype=np.int32)
    keys.sort()
    keys %= max(1, num)
    return keys.astype(np.int32)


def _beside_partners(pieces: Pieces, position: IntArray) -> list[IntArray]:
    """The holders of each set, in the order of the first destination to which each sends what no other may send.

    The line of a set's pieces has the same order, so most bytes go to a rank's partner, and pairs stay few. `position`
    is each destination rank's.
    """
    only = _only_holder(pieces)
    partner = np.full(1 + max(max(ranks) for ranks in pieces.holder_sets), len(position))
    sends = only != ZEROS
    np.minimum.at(partner, only[sends], position[pieces.destination[sends]])
    sets = [np.array(ranks, np.int64) for ranks in pieces.holder_sets]
    return [ranks[np.argsort(partner[ranks], kind="stable")] if len(ranks) > 1 else ranks for ranks in sets]


def _only_holder(pieces: Pieces) -> Column:
    """The rank that has to send each piece, `[num_pieces]`; ZEROS where there is none, or a choice."""
    only = [ranks[0] if len(ranks) == 1 else ZEROS for ranks in pieces.holder_sets]
    return np.array(only, np.int32)[pieces.holders]


def balanced(sets: Sequence[IntArray], pieces: Pieces, nbytes: IntArray, num_sources: int) -> list[IntArray]:
    """The bytes that each holder of each set sends, so that the busiest sender sends as little as can be.

    A set's bytes go to its least loaded holders, up to one level. Sets with fewer holders come first, because more
    holders can still even out the load. Then every set is levelled again, given the others' loads, until little
    changes. That converges to the least sum of squared loads, which has the least busiest sender too: the sum is
    convex, and each set's shares are constrained by themselves (block coordinate descent).
    """
    demand = np.zeros(len(sets), np.int64)
    np.add.at(demand, pieces.holders, nbytes)
    shares = [np.array([amount]) if len(ranks) == 1 else 0 * ranks for ranks, amount in zip(sets, demand, strict=True)]
    several = sorted((number for number, ranks in enumerate(sets) if len(ranks) > 1), key=lambda each: len(sets[each]))
    load = _load_without_choice(pieces, nbytes)
    for _ in range(MAX_SWEEPS if several else 0):
        before = load.copy()
        for number in several:
            load[sets[number]] -= shares[number]
            shares[number] = level(load[sets[number]], int(demand[number]))
            load[sets[number]] += shares[number]
        if np.abs(load - before).max() <= PRECISION * load.sum() / num_sources:
            break
    return shares


def _load_without_choice(pieces: Pieces, nbytes: IntArray) -> IntArray:
    """Bytes that each rank sends to others because no other may: `[1 + the highest holder]`."""
    only = _only_holder(pieces)
    sends = (only != ZEROS) & (only != pieces.destination)
    load = np.zeros(1 + max(max(ranks) for ranks in pieces.holder_sets), np.int64)
    np.add.at(load, only[sends], nbytes[sends])
    return load


def level(load: IntArray, amount: int) -> IntArray:
    """Share out `amount` so that the least loaded are raised to one level. Equal loads: the first get the remainder.

    Loads of 5, 1 and 2, to which 6 are added. To raise the least to the second's 2 takes 1, both to the third's 5 takes
    7: so two are raised, to (6 + 1 + 2) // 2 = 4, and 1 is left, which goes to the least loaded.

        5  #   +          ascending = [1, 2, 5], below = [1, 3, 8], to_reach = [0, 1, 7]
        4  #   +   +      shares = [0, 4, 2]
        3  #   +   +
        2  #   +   #
        1  #   #   #
    """
    order = np.argsort(load, kind="stable")
    ascending, below = load[order], np.cumsum(load[order])
    to_reach = ascending * np.arange(1, len(load) + 1) - below  # what raises all below to each one's load
    raised = int(np.searchsorted(to_reach, amount, side="right"))
    height, remainder = divmod(amount + int(below[raised - 1]), raised)
    shares = np.zeros_like(load)
    shares[order[:raised]] = height - ascending[:raised] + (np.arange(raised) < remainder)
    return shares


def _at_boundaries(bounds: IntArray, starts: IntArray, extents: IntArray, itemsizes: IntArray, slack: int) -> IntArray:
    """`bounds` moved to boundaries of pieces, tensors, or rows. Bytes on the line, `[num_bounds]`, ascending.

    Each is moved to the coarsest boundary that is near: within `slack` bytes the end of a piece, within MIN_SPLIT_BYTES
    any other. `starts` are those of all pieces; `extents` `[num_bounds, max_dims]` and `itemsizes` `[num_bounds]` are
    of the pieces that bounds lie in.
    """
    # The piece that a bound lies in, and how far in: 5 of the example in row 0, at offset 5.
    row = np.searchsorted(starts, bounds, side="right") - 1
    offset = bounds - starts[row]
    moved, final = offset.copy(), np.zeros(len(bounds), np.bool_)
    # From coarse to fine. A piece of [2, 3, 4] elements of one byte has boundaries every 24 bytes, the piece's own;
    # every 12, its tensors'; every 4, rows'; and every 1, elements', where a bound ends if nothing coarser is near.
    for dim in range(extents.shape[1] + 1):
        step = itemsizes * extents[:, dim:].prod(axis=1)
        nearest = (offset + step // 2) // step * step
        near = ~final & (np.abs(nearest - offset) <= (MIN_SPLIT_BYTES if dim else slack))
        moved[near] = nearest[near]
        final |= near
    return starts[row] + moved
