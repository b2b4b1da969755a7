"""The floor under all plans: no plan is below it, and what sets it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.config.relay import Relay
from refit.plan.cost import bytes_matrix, cost_of, lower_bound
from refit.plan.floor import floor_of, least_bytes
from refit.plan.sharding import Sharding
from tests.plan.strategies import overlapping_sides, sides
from tests.plan.test_relay import missing_on_nodes, on, relayed


def cluster(ranks_per_node: int, intra: float = 10.0, inter: float | None = 2.0) -> Cluster:
    return Cluster("example", intra, inter, ranks_per_node, None, None, None, "")


@given(
    st.one_of(sides(), overlapping_sides()),
    st.integers(1, 4),
    st.sampled_from([Relay.OFF, Relay.NODE, Relay.ENGINE]),
    st.integers(1, 2),
)
def test_no_plan_is_below_the_floor(
    pair: tuple[Sharding, Sharding], gpus_per_node: int, name: Relay, ranks_per_gpu: int
) -> None:
    speeds, ranks_per_node = cluster(gpus_per_node), gpus_per_node * ranks_per_gpu
    gpus = GpuMap(ranks_per_node, ranks_per_gpu)
    plan, least = relayed(*pair, name, ranks_per_node), least_bytes(*pair, ranks_per_node)
    floor, bound = floor_of(least, speeds, ranks_per_node, gpus), lower_bound(bytes_matrix(plan), speeds, gpus)
    assert floor is not None
    assert bound is not None
    assert floor.seconds <= bound.seconds + 1e-9, (floor, bound)


@given(st.one_of(sides(), overlapping_sides()), st.integers(1, 4))
def test_what_every_plan_moves(pair: tuple[Sharding, Sharding], ranks_per_node: int) -> None:
    least = least_bytes(*pair, ranks_per_node)
    missing = missing_on_nodes(*pair, ranks_per_node)
    assert dict(least.into) == {node: nbytes for node, nbytes in enumerate(missing.tolist()) if nbytes}
    received = cost_of(relayed(*pair, Relay.OFF, ranks_per_node)).received_by_rank
    assert {rank: nbytes for rank, nbytes in received.items() if nbytes} == dict(least.received)


def test_what_sets_it() -> None:
    """128 bytes, 2 bytes per second between nodes and 10 within, on each rank's link."""

    def floor(source: Sharding, destination: Sharding, ranks_per_node: int) -> tuple[float, str]:
        speeds = cluster(ranks_per_node)
        found = floor_of(least_bytes(source, destination, ranks_per_node), speeds, ranks_per_node)
        assert found is not None
        return found.seconds, found.limited_by.partition(" 128 bytes")[0]

    assert floor(on(0), on(2, 3), 2) == (64.0, "rank 0, the only one that holds them, sends")
    assert floor(on(0, 1, 2, 3), on(4), 4) == (64.0, "node 1 receives")
    assert floor(on(0), on(1), 2) == (pytest.approx(128 / 12), "rank 1 receives")
    assert floor(on(0), on(0), 2) == (0.0, "nothing moves")


def test_no_floor_where_the_network_is_not_known() -> None:
    assert floor_of(least_bytes(on(0), on(2), 2), cluster(2, inter=None), 2) is None
    within = floor_of(least_bytes(on(0), on(1), 2), cluster(2, inter=None), 2)
    assert within is not None
    assert within.seconds == pytest.approx(12.8)
