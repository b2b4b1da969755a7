"""Our process groups against those of Megatron's own parallel_state."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from refit.config.layout import Layout
from refit.models import process_groups
from refit.models.megatron.groups import AXES, build_groups, rank_groups
from refit.models.process_groups import group_cache
from tests.models.megatron.small import layout, playing
from tests.ranks.pool import RankPool

THEIRS = {
    "tp": "get_tensor_model_parallel_group",
    "dp": "get_data_parallel_group",
    "pp": "get_pipeline_model_parallel_group",
    "mp": "get_model_parallel_group",
    "cp": "get_context_parallel_group",
    "expt_tp": "get_expert_tensor_parallel_group",
    "ep": "get_expert_model_parallel_group",
    "expt_dp": "get_expert_data_parallel_group",
    "tp_ep": "get_expert_tensor_and_model_parallel_group",
    "tp_ep_pp": "get_expert_tensor_model_pipeline_parallel_group",
    "embd": "get_embedding_group",
}


@pytest.mark.parametrize(
    "where",
    [
        layout(tp=2, ep=2, etp=2, pp=2),
        layout(tp=2, ep=4, etp=1, pp=1, world=8),
        layout(tp=4, ep=2, etp=2, pp=1, world=8),
    ],
    ids=["tp2-ep2-etp2-pp2", "tp2-ep4-etp1", "tp4-ep2-etp2"],
)
def test_groups_equal_megatrons(where: Layout) -> None:
    for rank in where.ranks:
        with playing(rank, where.world_size):
            ours = build_groups(where)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=where.tp,
                pipeline_model_parallel_size=where.pp,
                expert_model_parallel_size=where.ep,
                expert_tensor_parallel_size=where.etp,
                create_gloo_process_groups=False,
            )
            for field, getter in THEIRS.items():
                if field == "embd" and where.coordinates(rank).pp not in (0, where.pp - 1):
                    continue
                theirs = dist.get_process_group_ranks(getattr(parallel_state, getter)())
                assert dist.get_process_group_ranks(getattr(ours, field)) == theirs, (rank, field)
            parallel_state.destroy_model_parallel()


def test_side_in_the_middle_of_the_job() -> None:
    where = layout(tp=2, ep=2, etp=1, pp=2, first=5)
    for name, axes in AXES.items():
        seen = sorted(rank for ranks in rank_groups(where, axes) for rank in ranks)
        assert seen == list(where.ranks), name
    assert rank_groups(where, ("pp",)) == [[5, 9], [6, 10], [7, 11], [8, 12]]
    assert rank_groups(where, ("ep",)) == [[5, 6], [7, 8], [9, 10], [11, 12]]


def test_a_rank_makes_its_own_groups_only() -> None:
    where = layout(tp=2, ep=2)
    with playing(7, 8):
        assert build_groups(where) is None
        assert len(group_cache()) == 0
    with playing(1, 8):
        groups = build_groups(where)
        assert groups is not None
        # (0, 1), (1, 3), all four, and one for every axis of size 1.
        assert len(group_cache()) == 4
        assert groups.pp is groups.cp
        assert dist.get_process_group_ranks(groups.pp) == [1]
        build_groups(where)
        assert len(group_cache()) == 4


def test_all_that_is_built_shares_its_groups() -> None:
    with playing(0, 4):
        one = build_groups(layout(tp=2, ep=2))
        other = build_groups(layout(tp=2, ep=1, world=4))
        assert one is not None
        assert other is not None
        assert one.tp is other.tp
        assert one.tp is one.tp_cp
        assert one.tp_dp_cp is dist.group.WORLD


def test_groups_end_with_their_default_group() -> None:
    with playing(0, 4):
        before = build_groups(layout(tp=2, ep=2))
    with playing(0, 4):
        after = build_groups(layout(tp=2, ep=2))
        assert before is not None
        assert after is not None
        assert after.tp is not before.tp
        assert dist.get_process_group_ranks(after.tp) == [0, 1]


def test_a_closed_cache_makes_its_groups_again() -> None:
    with playing(0, 4):
        before = build_groups(layout(tp=2, ep=2))
        group_cache().close()
        assert len(group_cache()) == 0
        after = build_groups(layout(tp=2, ep=2))
        assert before is not None
        assert after is not None
        assert after.tp is not before.tp
        assert after.tp_dp_cp is dist.group.WORLD


def test_groups_over_real_ranks(ranks: RankPool) -> None:
    sums = ranks.run(sum_over_window)
    assert sums == [None, None, None, 3 + 4, 3 + 4, 5 + 6, 5 + 6, None]


def test_ranks_in_different_numbers_of_groups_meet(ranks: RankPool) -> None:
    """Rank 3 is in the groups of two sides, rank 6 in those of one; then all are closed and made again."""
    assert ranks.run(sums_over_two_sides) == [None, None, None, 3 + 4, 3 + 4, 5 + 6, 5 + 6, None]


def sums_over_two_sides(rank: int) -> int | None:
    """With a cache of its own: torch keeps device meshes of earlier tests, whose groups must not end."""
    default = dist.group.WORLD
    assert default is not None
    shared, process_groups._CACHES[default] = group_cache(), process_groups.GroupCache()
    try:
        build_groups(layout(tp=2, ep=2))
        first = sum_over_window(rank)
        group_cache().close()
        assert sum_over_window(rank) == first
        group_cache().close()
    finally:
        process_groups._CACHES[default] = shared
    return first


def sum_over_window(rank: int) -> int | None:
    """All-reduce rank numbers over TP groups of a side whose first rank is 3."""
    groups = build_groups(layout(tp=2, ep=2, first=3))
    if groups is None:
        return None
    number = torch.tensor(rank)
    dist.all_reduce(number, group=groups.tp)
    return int(number)
