"""Process groups of one layout, on any consecutive ranks of the job."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from refit.config.layout import Layout
from refit.config.shape import ModelShape
from refit.models.process_groups import own_group
from refit.predict.megatron import word_embedding_stages

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

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
    "intra_dist_opt": ("pp", "dp", "tp"),
}
"""Fields of ProcessGroupCollection and the axes each spans.

All fields that building, training, forward and refit read are here. For a field that is not set, 0.16.1 raises and
0.19.2 takes the default group.
"""

PARALLEL_STATE = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "MODEL_PARALLEL_GROUP": "mp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "EMBEDDING_GROUP": "embd",
    "POSITION_EMBEDDING_GROUP": "pos_embd",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "dp_cp",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
    "EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "expt_dp",
    "INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
}
"""Globals of parallel_state, without the underscore in front, and the field of ProcessGroupCollection that each holds.

Those with GTP_REMAT are of 0.19.2.
"""


def build_groups(layout: Layout, shape: ModelShape | None = None) -> ProcessGroupCollection | None:
    """This rank's process groups for `layout`, or None on a rank outside it. `shape` is None for a provider's model.

    Groups come from the cache of `refit.models.process_groups`. Collective: every rank of the default group, idle ones
    included, with the same layouts in the same order.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    collection = ProcessGroupCollection()
    for name, axes in AXES.items():
        setattr(collection, name, own_group(rank_groups(layout, axes)))
    # Word embeddings are summed over the stages that hold them (`get_embedding_ranks` in Megatron-LM's initialize.py),
    # position embeddings stay on the first.
    pipelines = rank_groups(layout, AXES["pp"])
    stages = [0, layout.pp - 1]
    if shape is not None and shape.mtp_num_layers:
        stages = word_embedding_stages(shape, layout)
    collection.embd = own_group([sorted({ranks[stage] for stage in stages}) for ranks in pipelines])
    collection.pos_embd = own_group([ranks[:1] for ranks in pipelines])
    return collection if dist.get_rank() in layout.ranks else None


@contextlib.contextmanager
def in_parallel_state(groups: Any, num_chunks: int = 1) -> Iterator[None]:
    """Megatron's parallel_state holds `groups`, for a model of `num_chunks` chunks per rank, and a memory buffer.

    What it held before comes back afterwards, so both sides of a refit can have groups of their own.
    """
    state = vars(importlib.import_module("megatron.core.parallel_state"))
    values = {f"_{name}": getattr(groups, field) for name, field in PARALLEL_STATE.items()}
    values["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = num_chunks if num_chunks > 1 else None
    values["_GLOBAL_MEMORY_BUFFER"] = state["_GLOBAL_MEMORY_BUFFER"] or state["GlobalMemoryBuffer"]()
    before = {name: state[name] for name in values if name in state}
    state.update({name: values[name] for name in before})
    try:
        yield
    finally:
        state.update(before)


def rank_groups(layout: Layout, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of each group that spans `axes`, in Megatron's order (`parallel_state.RankGenerator`).

    Dense layers see the layout's ranks as [pp, dp, tp], routed experts as [pp, edp, ep, etp].
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
