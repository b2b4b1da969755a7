"""The process groups of one AutoTP side, on any consecutive ranks of the job, and DeepSpeed told of them.

`deepspeed.initialize` knows one world, that of all ranks, and makes its groups when it finds none. A side is part of
the ranks, and two sides may have different groups. So the suite makes the groups, with all ranks, and DeepSpeed finds
them where it keeps its own. It then talks to the side's ranks alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from refit.config.side import SideSpec
from refit.models.process_groups import own_group


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """This rank's groups: all ranks of the side, those of its TP group and its DP group."""

    side: dist.ProcessGroup
    tp: dist.ProcessGroup
    dp: dist.ProcessGroup


def build_groups(side: SideSpec) -> ParallelGroups | None:
    """The groups of `side`, or None on a rank outside it. Groups come from the cache of `refit.models.process_groups`.

    Collective: every rank of the default group, with the same sides in the same order.
    """
    grid = np.array(side.ranks).reshape(-1, side.layout.tp)
    ranks, tp, dp = (own_group(lines.tolist()) for lines in (grid.reshape(1, -1), grid, grid.T))
    return ParallelGroups(ranks, tp, dp) if ranks is not None and tp is not None and dp is not None else None


@contextmanager
def told_to(library: Any, groups: ParallelGroups) -> Iterator[None]:
    """DeepSpeed (`library`) uses `groups` within this context. What it needs later, its layers keep."""
    state = library.utils.groups
    given = {
        "_WORLD_GROUP": groups.side,
        "_TENSOR_MODEL_PARALLEL_GROUP": groups.tp,
        "_MODEL_PARALLEL_GROUP": groups.tp,
        "_DATA_PARALLEL_GROUP": groups.dp,
        "mpu": None,
    }
    before = {name: getattr(state, name) for name in given}
    try:
        for name, value in given.items():
            setattr(state, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)
