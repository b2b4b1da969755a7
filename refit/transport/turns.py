"""The order in which a rank serves its destinations, so that several sources do not crowd into one of them."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from refit.plan.box_array import IntArray
from refit.plan.cost import bytes_matrix, wire_only
from refit.plan.plan import RefitPlan
from refit.transport.messages import Schedule


def send_turns(matrix: IntArray) -> dict[int, list[int]]:
    """The destinations of every source, in the order in which it sends to them.

    `matrix` `[num_ranks, num_ranks]` holds the bytes from row to column. List scheduling of an open shop (Graham 1966;
    Gonzalez and Sahni 1976): whenever a source is free, it sends to the free destination that has the most still to
    receive, and to a busy one only where none of its own is free. Nothing enforces the turns while ranks send: they
    keep in step because every rank's link has the same speed.
    """
    left = wire_only(matrix)
    num_ranks = len(left)
    turns: dict[int, list[int]] = {source: [] for source in range(num_ranks) if left[source].any()}
    busy_until = np.zeros(num_ranks, np.int64)
    free = [(0, source) for source in turns]
    while free:
        now, source = heapq.heappop(free)
        waiting = np.flatnonzero(left[source])
        if not len(waiting):
            continue
        idle = waiting[busy_until[waiting] <= now]
        if len(idle):
            chosen = max(idle, key=lambda peer: (left[:, peer].sum(), left[source, peer], -peer))
        else:
            chosen = min(waiting, key=lambda peer: (busy_until[peer], peer))
        start = max(now, int(busy_until[chosen]))
        end = start + int(left[source, chosen])
        busy_until[chosen] = end
        left[source, chosen] = 0
        turns[source].append(int(chosen))
        heapq.heappush(free, (end, source))
    return turns


def in_turn(schedule: Schedule, plan: RefitPlan) -> Schedule:
    """`schedule` with its sends in the order of `send_turns`."""
    places = {peer: turn for turn, peer in enumerate(send_turns(bytes_matrix(plan)).get(schedule.rank, ()))}
    return replace(schedule, sends=tuple(sorted(schedule.sends, key=lambda channel: places[channel.destination])))
