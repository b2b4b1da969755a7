"""Properties of every plan, on random models and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.errors import PlanError
from refit.plan.plan import RefitPlan
from refit.plan.planner import merge, plan_refit
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding
from tests.plan.strategies import carry_out, expected, sides


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
    assert len(plan) == sum(
        len(shard.ranks) for tensor_sharding in pair[0].by_key.values() for shard in tensor_sharding.shards
    )


@given(sides())
def test_a_rank_never_fetches_what_it_holds(pair: tuple[Sharding, Sharding]) -> None:
    source = pair[0]
    for transfer in plan_refit(*pair).transfers():
        if transfer.destination in source.ranks:
            own = source.by_key[transfer.tensor.key].boxes_of(transfer.destination)
            held = any(box.intersect(transfer.box) for box in own)
            assert held == (transfer.source == transfer.destination)


@given(sides(), st.randoms())
def test_renaming_ranks_renames_the_plan(pair: tuple[Sharding, Sharding], random) -> None:
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


@given(sides(), st.integers(1, 4))
def test_merging_changes_no_element(pair: tuple[Sharding, Sharding], parts: int) -> None:
    plan = plan_refit(*pair)
    index = {key: number for number, key in enumerate(plan.keys)}
    rows = [(index[t.tensor.key], t.source, t.destination, t.box) for t in plan.transfers()]
    fine = [(*row[:3], part) for row in rows for part in row[3].split(parts)]
    merged = RefitPlan.from_rows(*pair, merge(fine))
    assert len(merged) <= len(plan)
    done = carry_out(merged)
    for place, array in expected(pair[1]).items():
        np.testing.assert_array_equal(done[place], array)


@given(sides(), st.data())
@settings(max_examples=50)
def test_a_plan_that_is_not_exact_cannot_be_built(pair: tuple[Sharding, Sharding], data: st.DataObject) -> None:
    plan = plan_refit(*pair)
    row = data.draw(st.integers(0, len(plan) - 1))
    columns = (plan.tensor, plan.source, plan.destination, plan.offsets, plan.extents)
    twice = np.sort(np.append(np.arange(len(plan)), row))
    for rows in (np.delete(np.arange(len(plan)), row), twice):
        with pytest.raises(PlanError):
            RefitPlan(*pair, plan.keys, *(column[rows] for column in columns))
    shifted = plan.offsets.copy()
    shifted[row, 0] += 100
    with pytest.raises(PlanError):
        RefitPlan(*pair, plan.keys, *columns[:3], shifted, plan.extents)
    stranger = plan.source.copy()
    stranger[row] = 1000
    with pytest.raises(PlanError):
        RefitPlan(*pair, plan.keys, plan.tensor, stranger, *columns[2:])
