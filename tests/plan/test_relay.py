"""Relays: what they deliver first, that each byte crosses to each node once, and over how many links."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.relay import Relay
from refit.plan import relay
from refit.plan.box import Box
from refit.plan.cost import bytes_matrix, cost_of
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from tests.plan.strategies import carry_out, expected, overlapping_sides, sides

ROWS = TensorSpec("weight", (16, 4), "bfloat16")
WHOLE = Box.whole(ROWS.shape)
ROW_BYTES = 8


@pytest.fixture(autouse=True)
def small_parts() -> Iterator[None]:
    """Boxes of tests are cut to the last row."""
    with mock.patch.object(relay, "MIN_PART_BYTES", 1):
        yield


def on(*ranks: int, box: Box = WHOLE) -> Sharding:
    return Sharding.from_ranks({rank: RankSharding.of([(ROWS, box)]) for rank in ranks})


def relayed(source: Sharding, destination: Sharding, name: Relay, ranks_per_node: int) -> RefitPlan:
    via = relay_stages(source, destination, name, ranks_per_node)
    return plan_refit(source, destination, ranks_per_node=ranks_per_node, via=via)


def between(plan: RefitPlan, ranks_per_node: int) -> np.ndarray:
    """Bytes from each node to each other node, `[num_nodes, num_nodes]`; the diagonal is 0."""
    matrix = bytes_matrix(plan)
    num_nodes = -(-len(matrix) // ranks_per_node)
    nodes = np.zeros((num_nodes, num_nodes), np.int64)
    for source, destination in np.argwhere(matrix):
        nodes[source // ranks_per_node, destination // ranks_per_node] += matrix[source, destination]
    np.fill_diagonal(nodes, 0)
    return nodes


def missing_on_nodes(source: Sharding, destination: Sharding, ranks_per_node: int) -> np.ndarray:
    """Bytes of distinct elements that each node needs and does not hold, element by element, `[num_nodes]`."""
    num_nodes = -(-(1 + max(*source.ranks, *destination.ranks)) // ranks_per_node)
    missing = np.zeros(num_nodes, np.int64)
    for key, spec in destination.tensors.items():
        for node in range(num_nodes):
            wanted, held = np.zeros(spec.shape, bool), np.zeros(spec.shape, bool)
            for marked, side in ((wanted, destination), (held, source)):
                for rank in side.ranks:
                    if rank // ranks_per_node == node:
                        for box in side.by_key[key].boxes_of(rank):
                            marked[box.slices_within(Box.whole(spec.shape))] = True
            missing[node] += int((wanted & ~held).sum()) * spec.itemsize
    return missing


@st.composite
def overlapping_destinations(draw: st.DrawFn) -> tuple[Sharding, Sharding]:
    """Ranks of the destination cut the tensors in their own ways, so that their boxes overlap without being equal."""
    destination, source = draw(overlapping_sides())
    return source, destination


@given(
    st.one_of(sides(), overlapping_sides(), overlapping_destinations()),
    st.integers(1, 4),
    st.sampled_from([Relay.NODE, Relay.ENGINE]),
)
def test_each_byte_crosses_to_each_node_once(pair: tuple[Sharding, Sharding], ranks_per_node: int, name: Relay) -> None:
    plan = relayed(*pair, name, ranks_per_node)
    done = carry_out(plan)
    for place, array in expected(pair[1]).items():
        np.testing.assert_array_equal(done[place], array, err_msg=str(place))
    crossed = between(plan, ranks_per_node).sum(0)
    np.testing.assert_array_equal(crossed, missing_on_nodes(*pair, ranks_per_node))
    direct = plan_refit(*pair, ranks_per_node=ranks_per_node)
    assert cost_of(plan).payload_bytes == cost_of(direct).payload_bytes
    assert (crossed <= between(direct, ranks_per_node).sum(0)).all()


@given(sides(), st.integers(1, 4))
def test_no_stage_where_nothing_would_cross_twice(pair: tuple[Sharding, Sharding], ranks_per_node: int) -> None:
    direct = between(plan_refit(*pair, ranks_per_node=ranks_per_node), ranks_per_node).sum(0)
    if not relay_stages(*pair, Relay.NODE, ranks_per_node):
        np.testing.assert_array_equal(direct, missing_on_nodes(*pair, ranks_per_node))
    assert relay_stages(*pair, Relay.OFF, ranks_per_node) == []


def test_a_nodes_ranks_get_a_part_each_and_exchange_them() -> None:
    plan = relayed(on(0), on(4, 5, 6, 7), Relay.NODE, 4)
    cost = cost_of(plan)
    assert plan.num_stages == 2
    assert cost.sent_by_rank == {0: 128, **dict.fromkeys((4, 5, 6, 7), 3 * 32)}
    assert [t.box.extents[0] for t in plan.transfers() if t.stage == 0] == [4] * 4


def test_nodes_get_a_part_each_and_exchange_them() -> None:
    """Four engines on a node each: the source sends one copy, and no node sends more than that."""
    plan = relayed(on(0), on(1, 2, 3, 4), Relay.ENGINE, 1)
    assert plan.num_stages == 2
    assert cost_of(plan).sent_by_rank == {0: 128, **dict.fromkeys((1, 2, 3, 4), 3 * 32)}
    assert cost_of(relayed(on(0), on(1, 2, 3, 4), Relay.OFF, 1)).sent_by_rank == {0: 512}
    assert relay_stages(on(0), on(1, 2, 3, 4), Relay.NODE, 1) == []


def test_over_nodes_then_within_them() -> None:
    plan = relayed(on(0, 1), on(2, 3, 4, 5), Relay.ENGINE, 2)
    assert plan.num_stages == 3
    assert between(plan, 2).tolist() == [[0, 64, 64], [0, 0, 64], [0, 64, 0]]
    assert cost_of(plan).received_by_rank == dict.fromkeys((2, 3, 4, 5), 128)


def test_what_a_node_holds_is_not_relayed_to_it() -> None:
    """Rank 1 has all of it on the node of ranks 0 and 1: both copies come from there, without a later stage."""
    plan = relayed(on(1), on(0, 1, 2, 3), Relay.NODE, 2)
    assert {(t.stage, t.source, t.destination) for t in plan.transfers() if t.destination < 2} == {(0, 1, 0), (0, 1, 1)}
    assert between(plan, 2).tolist() == [[0, 128], [0, 0]]


def test_small_boxes_go_whole_to_the_rank_with_the_least() -> None:
    """Rank 2 alone needs the large tensor, so rank 3 gets the small one from the source."""
    large, small = TensorSpec("large", (8, 8), "bfloat16"), TensorSpec("small", (4,), "bfloat16")
    parts = {spec: (spec, Box.whole(spec.shape)) for spec in (large, small)}
    source = Sharding.from_ranks({0: RankSharding.of(parts.values())})
    destination = Sharding.from_ranks({2: RankSharding.of(parts.values()), 3: RankSharding.of([parts[small]])})
    with mock.patch.object(relay, "MIN_PART_BYTES", 1 << 10):
        plan = relayed(source, destination, Relay.NODE, 2)
    first = {(t.tensor.key, t.destination) for t in plan.transfers() if t.stage == 0}
    assert first == {("large", 2), ("small", 3)}


def test_parts_begin_at_whole_blocks() -> None:
    assert [box.offsets[0] for box in relay._cut(Box((0, 0), (1000, 2)), 3)] == [0, 384, 640]
    assert [box.offsets[0] for box in relay._cut(Box((5,), (10,)), 4)] == [5, 7, 10, 12]
    assert relay._cut(Box((0, 0), (1, 1)), 4) == [Box((0, 0), (1, 1))]
