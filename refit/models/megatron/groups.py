"""Process groups of one layout on its window of ranks, anywhere in the world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from refit.config.layout import Layout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

GroupCache: TypeAlias = dict[tuple[int, ...], Any]
"""Process groups by their ranks, for one world: a source and a destination on the same ranks share many of them."""

AXES: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "mp": ("pp", "tp"),
    "tp_cp": ("tp",),
    "dp_cp": ("dp",),
    "cp": (),
    "tp_dp_cp": ("dp", "tp"),
    "expt_tp": ("etp",),
    "ep": ("ep",),
    "expt_dp": ("edp",),
    "tp_ep": ("ep", "etp"),
    "tp_ep_pp": ("pp", "ep", "etp"),
}
"""Fields of ProcessGroupCollection and the axes each spans. 0.16.1 raises for a field that is read and not set, 0.19.2
takes the default group instead: so all that building, forward and refit read are here."""


def build_groups(layout: Layout, cache: GroupCache | None = None) -> ProcessGroupCollection | None:
    """This rank's process groups for `layout`, or None on a rank outside its window.

    Collective: every rank of the default group must call, idle ones too, with layouts in the same order; `cache` must
    hold the same on all of them.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    cache = {} if cache is None else cache
    collection = ProcessGroupCollection()
    for name, axes in AXES.items():
        setattr(collection, name, _mine(rank_groups(layout, axes), cache))
    # Tied embeddings are summed over the first and last stage, position embeddings stay on the first.
    pipelines = rank_groups(layout, AXES["pp"])
    collection.embd = _mine([sorted({ranks[0], ranks[-1]}) for ranks in pipelines], cache)
    collection.pos_embd = _mine([ranks[:1] for ranks in pipelines], cache)
    return collection if dist.get_rank() in layout.ranks else None


def rank_groups(layout: Layout, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of each group that spans `axes`, in Megatron's order (`parallel_state.RankGenerator`).

    The window is [pp, dp, tp] to the dense layers and [pp, edp, ep, etp] to the routed experts.
    """
    window = np.array(layout.ranks)
    if {"ep", "etp", "edp"} & set(axes):
        names, sizes = ["pp", "edp", "ep", "etp"], [layout.pp, layout.edp, layout.ep, layout.etp]
    else:
        names, sizes = ["pp", "dp", "tp"], [layout.pp, layout.dp, layout.tp]
    grid: npt.NDArray[np.int64] = window.reshape(sizes)
    spanned = [names.index(axis) for axis in axes]
    grid = np.moveaxis(grid, spanned, range(len(sizes) - len(spanned), len(sizes)))
    return [[int(rank) for rank in ranks] for ranks in grid.reshape(-1, int(np.prod([sizes[dim] for dim in spanned])))]


def _mine(groups: list[list[int]], cache: GroupCache) -> Any:
    """Make every group and return this rank's, or None. `new_group` is collective, so nobody may skip one."""
    mine = None
    for ranks in groups:
        key = tuple(ranks)
        if key not in cache:
            cache[key] = dist.new_group(ranks)
        if dist.get_rank() in key:
            mine = cache[key]
    return mine
