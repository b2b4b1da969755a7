"""Who packs changes, and whom they reach, in a plan whose ranks pass messages on as they are. Imports no torch."""

from __future__ import annotations

import numpy as np

from refit.plan.box_array import BoolArray, IntArray
from refit.plan.plan import RefitPlan


def reached(plan: RefitPlan, rank: int) -> list[int]:
    """The ranks that may get what `rank` packs, from itself or passed on: all of them have to hold what it builds on.

    Some of them may get nothing of it: a relay of several sources passes on only a part of each to some.
    """
    found = {rank}
    for stage in range(plan.num_stages):
        sent = plan.is_wire & (plan.stage == stage) & np.isin(plan.source, list(found))
        found |= set(plan.destination[sent].tolist())
    return sorted(found - {rank})


def packs(plan: RefitPlan, rank: int) -> bool:
    """Whether `rank` sends what no other rank has sent it: its own, or what it has got by a copy of its own."""
    mine = plan.source == rank
    sends = mine & plan.is_wire
    return bool((sends & (plan.stage == 0)).any() or (sends.any() and (mine & plan.is_local).any()))


def packed_bytes(plan: RefitPlan) -> IntArray:
    """What each rank packs, at most, `[num_ranks]`: its own weights, and of what it passes on that which it had."""
    own, later = (_sent_bytes(plan, plan.is_wire & stage) for stage in (plan.stage == 0, plan.stage > 0))
    return own + np.where(_sent_bytes(plan, plan.is_local) > 0, later, 0)


def _sent_bytes(plan: RefitPlan, routes: BoolArray) -> IntArray:
    nbytes = np.zeros(1 + plan.ranks[-1], np.int64)
    np.add.at(nbytes, plan.source[routes], plan.nbytes[routes])
    return nbytes
