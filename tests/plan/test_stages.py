"""Plans of several stages: what they deliver, what they cost, which faults the proof finds, and one stage as before."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.clusters import Cluster
from refit.errors import PlanError
from refit.plan.box import Box
from refit.plan.box_array import BoxArray
from refit.plan.cost import Bound, bytes_matrix, cost_of, lower_bound
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import first_holders
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from tests.plan.strategies import carry_out, expected, overlapping_sides, side, sides, staged
from tests.plan.test_planner_scale import kimi_k2, row_shards_to_tp16

WEIGHT = TensorSpec("weight", (8, 4), "bfloat16")
WHOLE = Box.whole(WEIGHT.shape)
NODES = Cluster("example", 10.0, 2.0, 2, None, None, None, "")
"""Two ranks to a node; 10 bytes per second within, 2 between."""


def on(*ranks: int, box: Box = WHOLE) -> Sharding:
    """`box` of the weight, on each of `ranks`."""
    return Sharding.from_ranks({rank: RankSharding.of([(WEIGHT, box)]) for rank in ranks})


def once_per_node() -> RefitPlan:
    """Rank 0 to the nodes of ranks 2, 3 and of ranks 4, 5, by way of the first of each."""
    source, destination = on(0), on(2, 3, 4, 5)
    return plan_refit(source, destination, via=[first_holders(source, destination, lambda shard: shard.ranks[::2])])


def chain() -> RefitPlan:
    """Rank 0 to 1 to 2 to 3."""
    return plan_refit(on(0), on(1, 2, 3), via=[on(1), on(1, 2)], ranks_per_node=2)


def routes(plan: RefitPlan) -> set[tuple[int, int, int]]:
    return {(t.stage, t.source, t.destination) for t in plan.transfers()}


@given(st.one_of(sides(), overlapping_sides()), st.integers(2, 4), st.randoms(use_true_random=False))
def test_every_element_arrives_by_way_of_others(
    pair: tuple[Sharding, Sharding], num_stages: int, random: Random
) -> None:
    plan = staged(*pair, num_stages, random)
    done = carry_out(plan)
    for place, array in expected(pair[1]).items():
        np.testing.assert_array_equal(done[place], array, err_msg=str(place))
    cost = cost_of(plan)
    assert plan.num_stages == num_stages
    assert cost.payload_bytes == sum(pair[1].bytes_per_rank.values()) == cost.wire_bytes + cost.local_bytes
    assert cost.wire_bytes == sum(cost.sent_by_rank.values()) == sum(cost.received_by_rank.values())


@given(sides(), st.integers(2, 3), st.randoms(use_true_random=False))
def test_what_lies_at_home_is_copied_and_only_once(
    pair: tuple[Sharding, Sharding], num_stages: int, random: Random
) -> None:
    """A rank that holds a whole box of the destination at the source needs it from nobody."""
    plan = staged(*pair, num_stages, random)
    for transfer in plan.transfers():
        assert transfer.stage == 0 or transfer.source != transfer.destination
        if transfer.source != transfer.destination:
            key, rank = transfer.tensor.key, transfer.destination
            wanted = next(box for box in pair[1].by_key[key].boxes_of(rank) if box.contains(transfer.box))
            own = pair[0].by_key[key].boxes_of(rank) if rank in pair[0].ranks else ()
            assert not any(box.contains(wanted) for box in own)


def test_once_to_each_node() -> None:
    plan = once_per_node()
    assert routes(plan) == {(0, 0, 2), (0, 0, 4), (1, 2, 3), (1, 4, 5)}
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes, cost.num_transfers) == (256, 256, 0, 4)
    assert cost.sent_by_rank == {0: 128, 2: 64, 4: 64}
    assert cost.received_by_rank == {2: 64, 3: 64, 4: 64, 5: 64}
    matrix = bytes_matrix(plan)
    assert matrix[0].tolist() == [0, 0, 64, 0, 64, 0]
    assert matrix[2].tolist() == [0, 0, 0, 64, 0, 0]
    # All links at once: the network carries two copies out of rank 0, where one stage has it carry four.
    assert lower_bound(matrix, NODES) == Bound("example", 64.0, "rank 0 sends 128 bytes between nodes at 2e-09 GB/s")
    at_once = bytes_matrix(plan_refit(on(0), on(2, 3, 4, 5)))
    assert lower_bound(at_once, NODES) == Bound("example", 128.0, "rank 0 sends 256 bytes between nodes at 2e-09 GB/s")


def test_a_chain_of_three_stages() -> None:
    plan = chain()
    assert routes(plan) == {(0, 0, 1), (1, 1, 2), (2, 2, 3)}
    assert [transfer.stage for transfer in plan.for_rank(2).receives] == [1]
    assert [transfer.stage for transfer in plan.for_rank(2).sends] == [2]
    assert cost_of(plan).sent_by_rank == {0: 64, 1: 64, 2: 64}


def test_holders_that_get_a_part_each_exchange_them() -> None:
    """Each of two neighbours gets half of the weight from elsewhere: half of the bytes cross, over both their links."""
    halves = {1: Box((0, 0), (4, 4)), 2: Box((4, 0), (4, 4))}
    first = Sharding.from_ranks({rank: RankSharding.of([(WEIGHT, box)]) for rank, box in halves.items()})
    plan = plan_refit(on(0), on(1, 2), via=[first])
    assert routes(plan) == {(0, 0, 1), (0, 0, 2), (1, 1, 2), (1, 2, 1)}
    assert cost_of(plan).received_by_rank == {1: 64, 2: 64}
    assert cost_of(plan).sent_by_rank == {0: 64, 1: 32, 2: 32}


def test_a_cast_is_made_in_the_first_stage() -> None:
    narrow = replace(WEIGHT, dtype="float32")
    wide = side(range(1, 3), {narrow: [[WHOLE], [WHOLE]]})
    plan = plan_refit(on(0), wide, via=[first_holders(on(0), wide, lambda shard: shard.ranks[:1])])
    assert [(t.stage, t.source_dtype) for t in plan.transfers()] == [(0, "bfloat16"), (1, "float32")]


def test_padding_is_zeroed_once_and_then_passed_on() -> None:
    source = side(range(1), {TensorSpec("word", (6, 4), "bfloat16", padded=True): [[Box.whole((6, 4))]]})
    spec = TensorSpec("word", (8, 4), "bfloat16", padded=True)
    destination = side(range(1, 3), {spec: [[WHOLE], [WHOLE]]})
    plan = plan_refit(source, destination, via=[first_holders(source, destination, lambda shard: shard.ranks[:1])])
    assert [(t.box.extents[0], t.destination) for t in plan.for_rank(1).zeros] == [(2, 1)]
    assert [t.box for t in plan.for_rank(2).receives] == [WHOLE]


def rearranged(plan: RefitPlan, rows: np.ndarray, **columns: np.ndarray) -> RefitPlan:
    names = ("stage", "tensor_class", "source", "destination")
    taken = {name: columns.get(name, getattr(plan, name))[rows] for name in names}
    return replace(plan, boxes=plan.boxes[rows], **taken)


def with_value(plan: RefitPlan, column: str, row: int, value: int) -> RefitPlan:
    values = getattr(plan, column).copy()
    values[row] = value
    return rearranged(plan, np.arange(len(plan)), **{column: values})


def row_of(plan: RefitPlan, stage: int, destination: int) -> int:
    return int(np.flatnonzero((plan.stage == stage) & (plan.destination == destination))[0])


def test_a_read_of_what_was_not_delivered_is_refused() -> None:
    plan = once_per_node()
    row = row_of(plan, 1, 3)
    with pytest.raises(PlanError, match=r"is read on rank 5 in stage 1, which does not hold it"):
        with_value(plan, "source", row, 5)  # rank 5 gets it in stage 1 itself
    with pytest.raises(PlanError, match=r"is read on rank 0 in stage 1, which does not hold it"):
        with_value(plan, "source", row, 0)  # later stages read the destination's memory, and the source has none
    with pytest.raises(PlanError, match=r"is read on rank 2 in stage 0, which does not hold it"):
        with_value(plan, "stage", row, 0)
    with pytest.raises(PlanError, match=r"is read on rank 2 in stage 1, which does not hold it"):
        with_value(chain(), "stage", row_of(chain(), 2, 3), 1)


def test_a_missing_box_is_found_in_its_stage() -> None:
    plan = once_per_node()
    for stage, rank in ((0, 2), (1, 3)):
        kept = np.delete(np.arange(len(plan)), row_of(plan, stage, rank))
        with pytest.raises(PlanError, match=f"weight on rank {rank}: 0 of 32 elements are written by the end of stage"):
            rearranged(plan, kept)


def test_what_comes_a_stage_late_is_not_there_to_be_passed_on() -> None:
    """All elements are written, and their readers hold them, but rank 2 gets in stage 1 what it should have by then."""
    plan = plan_refit(on(0), on(1, 2, 3), via=[on(1, 2)])
    row = row_of(plan, 0, 2)
    stage, source = plan.stage.copy(), plan.source.copy()
    stage[row], source[row] = 1, 1
    with pytest.raises(PlanError, match="weight on rank 2: 0 of 32 elements are written by the end of stage 0"):
        rearranged(plan, np.arange(len(plan)), stage=stage, source=source)


def test_a_second_write_is_refused_whichever_stage_makes_it() -> None:
    plan = once_per_node()
    twice = np.append(np.arange(len(plan)), row_of(plan, 0, 2))
    with pytest.raises(PlanError, match="weight is written twice on rank 2"):
        rearranged(plan, twice)
    # Rank 4 passes on to rank 2 what that one has since stage 0.
    destination = np.append(plan.destination, 2)
    again = np.append(np.arange(len(plan)), row_of(plan, 1, 5))
    with pytest.raises(PlanError, match="weight is written twice on rank 2"):
        replace(
            plan,
            stage=plan.stage[again],
            tensor_class=plan.tensor_class[again],
            source=plan.source[again],
            destination=destination,
            boxes=plan.boxes[again],
        )


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(PlanError, match="is in stage 2 of 2"):
        with_value(once_per_node(), "stage", 0, 2)


def test_a_stage_must_deliver_parts_of_the_destination() -> None:
    other = side(range(1, 2), {TensorSpec("bias", (4,), "bfloat16"): [[Box.whole((4,))]]})
    for via in (other, on(9)):
        with pytest.raises(PlanError, match="a stage delivers other tensors, or to other ranks"):
            plan_refit(on(0), on(1, 2), via=[via])
    half = Box((0, 0), (4, 4))
    with pytest.raises(PlanError, match="rank 1 in stage 0, which does not hold it"):
        plan_refit(on(0), on(1, 2, box=half), via=[on(1)])  # more than the destination has
    with pytest.raises(PlanError, match="no source holds"):
        plan_refit(on(0), on(1, 2), via=[on(1, box=half)])  # less than is passed on
    with pytest.raises(PlanError):
        plan_refit(on(0), on(1, 2, 3), via=[on(1, 2), on(1)])  # rank 2 would lose it again


def test_a_box_shifted_in_a_later_stage_is_refused() -> None:
    plan = once_per_node()
    shift = np.zeros_like(plan.boxes.offsets)
    shift[row_of(plan, 1, 3), 1] = 1
    with pytest.raises(PlanError):
        replace(plan, boxes=BoxArray(plan.boxes.offsets + shift, plan.boxes.ends + shift))


@given(sides(), st.randoms(use_true_random=False))
def test_stages_belong_to_the_digest(pair: tuple[Sharding, Sharding], random: Random) -> None:
    plan = staged(*pair, 2, random)
    assert plan.digest == plan_refit(*pair, via=plan.shardings[1:-1]).digest
    assert plan.digest != plan_refit(*pair).digest


def test_one_stage_has_the_digest_that_it_had_before_there_were_stages() -> None:
    """The figures are those of plans made without stages. Results of one plan are compared by them."""
    assert kimi_k2(64, 8, 4).digest == "e4666d7915eb547e626f36349e680049c7d55c9a59f566af6d7af5bc4530bf2a"
    rows = row_shards_to_tp16(60, 4, replicas=2)
    assert rows.digest == "91e76b3cea01c028b0c446ffdbbe930a4935097b978c04e1ede3cd44f6587467"
    assert kimi_k2(64, 8, 4).num_stages == 1
