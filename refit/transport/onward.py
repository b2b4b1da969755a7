"""Where the parts of a message go on to, so that what an encoding has packed can be passed on as it is.

A message that an encoding packs can be passed on only as a whole: nobody but its decoder knows what is in it. So all of
its pieces have the same way onward: the same hops, each of a stage from a rank to a rank, down to the last that gets
them. Rank 1 gets box p to r and passes q and r on to rank 2, which passes r on to rank 3:

    0 to 1    p: no hops        q: 1 to 2        r: 1 to 2, 2 to 3
    1 to 2                      q: no hops       r: 2 to 3

makes three messages from 0 to 1, of which two go on, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.transport.overlaps import Overlaps

Hop = tuple[int, int, int]
"""A stage, the rank that passes on, and the rank that it passes on to."""

Hops = frozenset[Hop]


class Onward:
    """The ways onward of what ranks receive under one plan."""

    def __init__(self, plan: RefitPlan) -> None:
        self._plan = plan
        self._sent: dict[tuple[int, int], Overlaps[tuple[Box, int, int]]] = {}

    def parts(self, key: str, box: Box, rank: int, stage: int) -> list[tuple[Box, Hops]]:
        """Disjoint parts of `box` of the tensor `key`, which `rank` receives in `stage`, with the hops that follow."""
        parts: list[tuple[Box, Hops]] = [(box, frozenset())]
        for sent, later, peer in self._sent_after(rank, stage).find(key, box):
            common = box.intersect(sent)
            assert common is not None
            for part, hops in self.parts(key, common, peer, later):
                parts = list(_marked(parts, part, hops | {(later, rank, peer)}))
        return parts

    def _sent_after(self, rank: int, stage: int) -> Overlaps[tuple[Box, int, int]]:
        """What `rank` sends in later stages: each box with its stage and its destination."""
        if (rank, stage) not in self._sent:
            plan, found = self._plan, Overlaps[tuple[Box, int, int]]()
            for transfer in plan.transfers(np.flatnonzero(plan.is_wire & (plan.source == rank) & (plan.stage > stage))):
                found.add(transfer.tensor.key, transfer.box, (transfer.box, transfer.stage, transfer.destination))
            self._sent[rank, stage] = found
        return self._sent[rank, stage]


def _marked(parts: list[tuple[Box, Hops]], marked: Box, hops: Hops) -> Iterator[tuple[Box, Hops]]:
    """`parts`, cut where `marked` begins and ends, with `hops` added to those within it."""
    for part, known in parts:
        common = part.intersect(marked)
        if common is None:
            yield part, known
            continue
        yield common, known | hops
        yield from ((rest, known) for rest in part.subtract(common))
