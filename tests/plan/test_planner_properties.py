"""Properties of every plan, on random models and ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.errors import PlanError
from refit.plan.box_array import BoxArray
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding
from tests.plan.strategies import carry_out, expected, overlapping_sides, sides


@given(sides())
def test_every_destination_element_gets_its_source_element(pair: tuple[Sharding, Sharding]) -> None:
    done, wanted = carry_out(plan_refit(*pair)), expected(pair[1])
    for place, array in wanted.items():
        np.testing.assert_array_equal(done[place], array, err_msg=str(place))


@given(sides())
def test_bytes_are_conserved(pair: tuple[Sharding, Sharding]) -> None:
    plan = plan_refit(*pair)
    received = dict.fromkeys(pair[1].ranks, 0)
    for transfer in plan.transfers():
        received[transfer.destination] += transfer.nbytes
    assert received == pair[1].bytes_per_rank


@given(sides())
def test_identical_layouts_on_the_same_ranks_copy_locally(pair: tuple[Sharding, Sharding]) -> None:
    plan = plan_refit(pair[0], pair[0])
    assert plan.is_local.all()
    assert plan.num_transfers == sum(
        len(shard.ranks) for tensor_sharding in pair[0].by_key.values() for shard in tensor_sharding.shards
    )


@given(sides())
def test_a_rank_never_fetches_what_it_holds(pair: tuple[Sharding, Sharding]) -> None:
    _check_own_copies(plan_refit(*pair))


def _check_own_copies(plan: RefitPlan) -> None:
    source = plan.source_sharding
    for transfer in plan.transfers():
        if transfer.destination in source.ranks:
            own = source.by_key[transfer.tensor.key].boxes_of(transfer.destination)
            held = any(box.intersect(transfer.box) for box in own)
            assert held == (transfer.source == transfer.destination)


@given(st.one_of(sides(), overlapping_sides()), st.integers(1, 3), st.randoms())
def test_renaming_ranks_renames_the_plan(pair: tuple[Sharding, Sharding], layers: int, random) -> None:
    pair = tuple(_repeated(sharding, layers) for sharding in pair)
    names = list(range(100))
    random.shuffle(names)
    plain = plan_refit(*pair)
    renamed = plan_refit(*(_rename(sharding, names) for sharding in pair))
    assert {(t.tensor.key, t.box, names[t.source], names[t.destination]) for t in plain.transfers()} == {
        (t.tensor.key, t.box, t.source, t.destination) for t in renamed.transfers()
    }


def _rename(sharding: Sharding, names: list[int]) -> Sharding:
    by_key = {
        key: TensorSharding(
            tuple(
                ReplicatedShard(shard.box, tuple(names[rank] for rank in shard.ranks))
                for shard in tensor_sharding.shards
            )
        )
        for key, tensor_sharding in sharding.by_key.items()
    }
    return Sharding(tuple(names[rank] for rank in sharding.ranks), sharding.tensors, by_key)


@given(sides())
def test_planning_twice_gives_the_same_digest(pair: tuple[Sharding, Sharding]) -> None:
    assert plan_refit(*pair).digest == plan_refit(*pair).digest


@given(overlapping_sides(), st.sampled_from([None, 2, 3]))
def test_a_source_whose_boxes_overlap_fills_every_element(
    pair: tuple[Sharding, Sharding], ranks_per_node: int | None
) -> None:
    plan = plan_refit(*pair, ranks_per_node=ranks_per_node)
    done, wanted = carry_out(plan), expected(pair[1])
    for place, array in wanted.items():
        np.testing.assert_array_equal(done[place], array, err_msg=str(place))
    _check_own_copies(plan)


@given(sides(), st.integers(2, 5))
def test_layers_of_one_geometry_are_planned_as_so_many_tensors(pair: tuple[Sharding, Sharding], layers: int) -> None:
    """With every tensor repeated under other keys all elements arrive, and no class is added."""
    deep = tuple(_repeated(sharding, layers) for sharding in pair)
    plan = plan_refit(*deep)
    done = carry_out(plan)
    for place, array in expected(deep[1]).items():
        np.testing.assert_array_equal(done[place], array, err_msg=str(place))
    assert len(plan.classes) <= len(pair[1].tensors)


def _repeated(sharding: Sharding, layers: int) -> Sharding:
    keys = [(f"layer{layer}.{key}", key) for layer in range(layers) for key in sharding.tensors]
    return Sharding(
        sharding.ranks,
        {new: replace(sharding.tensors[key], key=new) for new, key in keys},
        {new: sharding.by_key[key] for new, key in keys},
    )


@given(sides(), st.data())
@settings(max_examples=50)
def test_a_plan_that_is_not_exact_cannot_be_built(pair: tuple[Sharding, Sharding], data: st.DataObject) -> None:
    plan = plan_refit(*pair)
    row = data.draw(st.integers(0, len(plan) - 1))
    twice = np.sort(np.append(np.arange(len(plan)), row))
    for rows in (np.delete(np.arange(len(plan)), row), twice):
        with pytest.raises(PlanError):
            replace(
                plan,
                stage=plan.stage[rows],
                tensor_class=plan.tensor_class[rows],
                source=plan.source[rows],
                destination=plan.destination[rows],
                boxes=plan.boxes[rows],
            )
    for dim in range(plan.classes[plan.tensor_class[row]].dims):
        shift = np.zeros_like(plan.boxes.offsets)
        shift[row, dim] = 100
        with pytest.raises(PlanError):
            replace(plan, boxes=BoxArray(plan.boxes.offsets + shift, plan.boxes.ends + shift))
    stranger = plan.source.copy()
    stranger[row] = 1000
    with pytest.raises(PlanError):
        replace(plan, source=stranger)
