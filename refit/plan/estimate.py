"""An estimate of a refit's time that includes the filling of the pipeline, where bytes are passed on.

The lower bound has all links busy from the first moment to the last. But what a stage passes on begins LAG messages
behind the stage before, and ends as much later. In these steps its links carry nothing but its own messages:

    step            0    1    2    3    4    5
    stage 0        m0   m1   m2   m3                 links of both at work in steps 2 and 3
    stage 1                  m0   m1   m2   m3       steps 4 and 5 come on top: LAG of them for each later stage

So the estimate is the bound and, for each later stage, the time that LAG rounds of its messages need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.plan.box_array import IntArray
from refit.plan.cost import Bound, bytes_matrix, lower_bound, wire_only
from refit.plan.plan import RefitPlan

LAG = 2
"""Steps from a message's arrival to its being passed on. With one, nothing would be on its way to a rank while it
unpacks what it is to pass on. Each further one is a step more per rank of a chain."""


@dataclass(frozen=True, slots=True)
class MessageSize:
    """The most bytes of a message of a pair, and of all messages that a rank sends, or receives, in one step."""

    of_pair: int
    of_rank: int


def rounds_of(plan: RefitPlan, size: MessageSize) -> Iterator[IntArray]:
    """For each stage but the first, the bytes of one round of its messages, `[num_ranks, num_ranks]`."""
    for stage in range(1, plan.num_stages):
        nbytes = np.where(plan.is_wire & (plan.stage == stage), plan.nbytes, 0)
        matrix = np.minimum(wire_only(bytes_matrix(plan, nbytes)), size.of_pair)
        most = max(int(matrix.sum(0).max()), int(matrix.sum(1).max()), 1)
        yield matrix if most <= size.of_rank else matrix * size.of_rank // most


def filling_s(plan: RefitPlan, size: MessageSize, cluster: Cluster, gpus: GpuMap | None = None) -> float:
    """Seconds that the later stages of `plan` go on for when the first has ended; 0 with one stage."""
    bounds = (lower_bound(matrix, cluster, gpus) for matrix in rounds_of(plan, size))
    return LAG * sum(bound.seconds for bound in bounds if bound is not None)


def estimate_s(bound: Bound | None, fill_s: float) -> float | None:
    """Seconds of a refit; None without a bound."""
    return None if bound is None else bound.seconds + fill_s
