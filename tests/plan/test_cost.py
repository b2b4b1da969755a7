"""Costs of small plans, by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.clusters import Cluster
from refit.config.gpus import GpuMap
from refit.plan.box import Box
from refit.plan.box_array import IntArray
from refit.plan.cost import (
    Bound,
    BusiestRank,
    Cost,
    bytes_matrix,
    cost_of,
    lower_bound,
    per_gpu,
    split_traffic,
    wire_only,
)
from refit.plan.planner import plan_refit
from refit.plan.sharding import RankSharding, Sharding, TensorSpec

WEIGHT = TensorSpec("weight", (8, 4), "bfloat16")
NORM = TensorSpec("norm", (4,), "float32")


def cluster(
    intra: float = 10.0, inter: float | None = 2.0, gpus_per_node: int = 2, copy: float | None = None
) -> Cluster:
    """Bytes per second, not GB/s: small plans then take seconds."""
    return Cluster("example", intra, inter, gpus_per_node, copy, None, None, "")


def rows(begin: int, end: int) -> tuple[TensorSpec, Box]:
    return WEIGHT, Box((begin, 0), (end - begin, 4))


def sharding(shards: dict[int, list[tuple[TensorSpec, Box]]]) -> Sharding:
    return Sharding.from_ranks({rank: RankSharding.of(parts) for rank, parts in shards.items()})


def test_disjoint_ranks() -> None:
    """Two sources hold half a tensor each. One destination gets three quarters of it, the other a quarter."""
    plan = plan_refit(
        sharding({0: [rows(0, 4)], 1: [rows(4, 8)]}),
        sharding({2: [rows(0, 6)], 3: [rows(6, 8)]}),
    )
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes, cost.num_transfers) == (64, 64, 0, 3)
    assert cost.sent_by_rank == {0: 32, 1: 32}
    assert cost.received_by_rank == {2: 48, 3: 16}
    assert cost.source_weights_by_rank == {0: 32, 1: 32}
    assert cost.destination_weights_by_rank == {2: 48, 3: 16}
    assert (cost.digest, cost.casts) == (plan.digest, {})
    assert cost.busiest_sender == BusiestRank(0, 32, "sends")
    assert cost.busiest == cost.busiest_receiver == BusiestRank(2, 48, "receives")
    assert cost.sender_imbalance == 1.0
    assert plan.ranks == (0, 1, 2, 3)
    assert bytes_matrix(plan).tolist() == [[0, 0, 32, 0], [0, 0, 16, 16], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_shared_ranks_copy_locally_what_they_hold() -> None:
    """Rank 0 keeps its half and needs the other; rank 1 is no destination."""
    plan = plan_refit(sharding({0: [rows(0, 4)], 1: [rows(4, 8)]}), sharding({0: [rows(0, 8)]}))
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes) == (64, 32, 32)
    assert cost.sent_by_rank == {0: 0, 1: 32}
    assert cost.received_by_rank == {0: 32}
    assert cost.local_by_rank == {0: 32}
    assert cost.sender_imbalance == 2.0
    assert wire_only(bytes_matrix(plan)).tolist() == [[0, 0], [32, 0]]


def test_the_busiest_rank_is_the_receiver_where_sender_and_receiver_have_equally_many_bytes() -> None:
    one_pair = plan_refit(sharding({0: [rows(0, 8)]}), sharding({1: [rows(0, 8)]}))
    assert cost_of(one_pair).busiest == BusiestRank(1, 64, "receives")
    gathered = plan_refit(sharding({0: [rows(0, 8)]}), sharding({1: [rows(0, 2)], 2: [rows(2, 4)], 3: [rows(4, 8)]}))
    assert cost_of(gathered).busiest == BusiestRank(0, 64, "sends")


def test_nothing_on_the_wire() -> None:
    plan = plan_refit(sharding({0: [rows(0, 8)]}), sharding({0: [rows(0, 8)]}))
    cost = cost_of(plan)
    assert (cost.wire_bytes, cost.local_bytes, cost.sender_imbalance, cost.busiest.nbytes) == (0, 64, 1.0, 0)
    assert lower_bound(bytes_matrix(plan), cluster()) == Bound("example", 0.0, "nothing moves")


def test_padding_is_payload_that_nobody_sends() -> None:
    short = TensorSpec("vocabulary", (6, 4), "bfloat16", padded=True)
    long = TensorSpec("vocabulary", (8, 4), "bfloat16", padded=True)
    plan = plan_refit(sharding({0: [(short, Box.whole((6, 4)))]}), sharding({1: [(long, Box.whole((8, 4)))]}))
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes, cost.num_transfers) == (64, 48, 0, 1)


def test_dtypes_count_at_their_size() -> None:
    plan = plan_refit(sharding({0: [(NORM, Box.whole((4,)))]}), sharding({1: [(NORM, Box.whole((4,)))]}))
    assert cost_of(plan).wire_bytes == 16


def test_a_cost_survives_json() -> None:
    plan = plan_refit(sharding({0: [rows(0, 4)], 1: [rows(4, 8)]}), sharding({0: [rows(0, 8)]}))
    cost = cost_of(plan)
    read = msgspec.json.decode(msgspec.json.encode(cost), type=Cost)
    assert read == cost
    assert read.payload_bytes == read.wire_bytes + read.local_bytes == 64
    assert read.busiest.nbytes == 32
    assert read.source_weights_by_rank == {0: 32, 1: 32}
    assert read.sender_imbalance == pytest.approx(2.0)


def test_casts_name_both_dtypes() -> None:
    wide = TensorSpec("weight", (8, 4), "float32")
    cost = cost_of(plan_refit(sharding({0: [rows(0, 8)]}), sharding({1: [(wide, Box.whole((8, 4)))]})))
    assert cost.casts == {"weight": ("bfloat16", "float32")}
    assert cost.wire_bytes == 128


FOUR_RANKS = np.array([[7, 40, 0, 6], [0, 0, 5, 0], [0, 0, 0, 30], [0, 8, 0, 0]], np.int64)
"""Nodes of ranks 0-1 and 2-3: within them 40 and 30 bytes, between them 6, 5 and 8; 7 are local."""


def test_traffic_within_nodes_apart_from_traffic_between_them() -> None:
    traffic = split_traffic(FOUR_RANKS, 2)
    assert traffic.sent_within.tolist() == [40, 0, 30, 0]
    assert traffic.sent_between.tolist() == [6, 5, 0, 8]
    assert traffic.received_within.tolist() == [0, 40, 0, 30]
    assert traffic.received_between.tolist() == [0, 8, 5, 6]
    assert traffic.local.tolist() == [7, 0, 0, 0]


@pytest.mark.parametrize(
    ("intra", "inter", "copy", "expected"),
    [
        (10.0, 1.0, None, Bound("example", 8.0, "rank 1 receives 8 bytes between nodes at 1e-09 GB/s")),
        (4.0, 2.0, None, Bound("example", 10.0, "rank 1 receives 40 bytes within its node at 4e-09 GB/s")),
        (40.0, 40.0, 1.0, Bound("example", 7.0, "rank 0 copies 7 bytes within its GPU at 1e-09 GB/s")),
    ],
    ids=["the network", "NVLink", "copies"],
)
def test_what_limits_a_plan(intra: float, inter: float, copy: float | None, expected: Bound) -> None:
    assert lower_bound(FOUR_RANKS, cluster(intra, inter, 2, copy)) == expected


def test_what_encodings_read_and_write_counts_beside_copies() -> None:
    """Rank 0 copies 7 bytes, which are 14 read and written. Work of other ranks counts on their own GPUs."""
    of_copies = cluster(40.0, 40.0, 2, 1.0)
    assert lower_bound(FOUR_RANKS, of_copies, work={0: 6, 1: 19}) == Bound(
        "example", 10.0, "rank 0 reads and writes 20 bytes within its GPU at 2e-09 GB/s"
    )
    assert lower_bound(FOUR_RANKS, of_copies, work={1: 42}) == Bound(
        "example", 21.0, "rank 1 reads and writes 42 bytes within its GPU at 2e-09 GB/s"
    )
    assert lower_bound(FOUR_RANKS, cluster(copy=2.0), GpuMap(4, 4), {1: 42, 3: 6}) == Bound(
        "example", 60.0, "GPU 0 reads and writes 240 bytes within its memory at 4e-09 GB/s"
    )


def test_no_bound_where_bytes_cross_nodes_at_no_known_speed() -> None:
    assert lower_bound(FOUR_RANKS, cluster(inter=None)) is None
    assert lower_bound(FOUR_RANKS, cluster(inter=None, gpus_per_node=4)) == Bound(
        "example", 4.8, "rank 1 receives 48 bytes within its node at 1e-08 GB/s"
    )


def test_bytes_of_ranks_that_share_a_gpu_add_up() -> None:
    """Ranks 0 and 2 on GPU 0, 1 and 3 on GPU 1: 7 and 8 bytes stay on a GPU, 76 and 5 go to the other."""
    assert per_gpu(FOUR_RANKS, GpuMap(4, 2)).tolist() == [[7, 40 + 6 + 30], [5, 8]]
    assert per_gpu(FOUR_RANKS, GpuMap(4, 4)).tolist() == [[96]]
    assert per_gpu(FOUR_RANKS, GpuMap(4)).tolist() == FOUR_RANKS.tolist()


@pytest.mark.parametrize(
    ("gpus", "copy", "expected"),
    [
        (GpuMap(4, 4), 2.0, Bound("example", 48.0, "GPU 0 copies 96 bytes within its memory at 2e-09 GB/s")),
        (GpuMap(4, 2), 0.5, Bound("example", 16.0, "GPU 1 copies 8 bytes within its memory at 5e-10 GB/s")),
        (GpuMap(4, 2), 100.0, Bound("example", 7.6, "GPU 1 receives 76 bytes within its node at 1e-08 GB/s")),
        (GpuMap(4, 4), None, Bound("example", 0.0, "nothing moves")),
    ],
    ids=["all on one GPU", "memory", "links", "no speed of copies"],
)
def test_what_limits_ranks_that_share_gpus(gpus: GpuMap, copy: float | None, expected: Bound) -> None:
    assert lower_bound(FOUR_RANKS, cluster(copy=copy), gpus) == expected


def test_ranks_with_gpus_of_their_own_have_the_bound_of_ranks() -> None:
    assert lower_bound(FOUR_RANKS, cluster(), GpuMap(4)) == lower_bound(FOUR_RANKS, cluster())


def matrices() -> st.SearchStrategy[IntArray]:
    def square(num_ranks: int) -> st.SearchStrategy[IntArray]:
        row = st.lists(st.integers(0, 10**12), min_size=num_ranks, max_size=num_ranks)
        return st.lists(row, min_size=num_ranks, max_size=num_ranks).map(lambda rows: np.array(rows, np.int64))

    return st.integers(1, 6).flatmap(square)


@given(matrices(), st.floats(1e9, 1e12), st.floats(1e9, 1e12), st.integers(1, 8))
def test_two_kinds_of_links_lie_between_one_link_of_either_speed(
    matrix: IntArray, intra: float, inter: float, gpus_per_node: int
) -> None:
    """At the slower speed for all bytes it takes as long or longer; over one link as fast as both together, no
    longer."""
    wire = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    busiest = max(int(wire.sum(0).max()), int(wire.sum(1).max()))
    bound = lower_bound(matrix, cluster(intra, inter, gpus_per_node))
    assert bound is not None
    assert busiest / (intra + inter) * (1 - 1e-9) <= bound.seconds <= busiest / min(intra, inter) * (1 + 1e-9)


@given(matrices(), st.floats(1e9, 1e12), st.floats(1e9, 1e12))
def test_one_node_is_one_kind_of_link(matrix: IntArray, intra: float, inter: float) -> None:
    wire = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    busiest = max(int(wire.sum(0).max()), int(wire.sum(1).max()))
    together = lower_bound(matrix, cluster(intra, None, len(matrix)))
    apart = lower_bound(matrix, cluster(intra, inter, 1))
    assert together is not None
    assert apart is not None
    assert together.seconds == pytest.approx(busiest / intra)
    assert apart.seconds == pytest.approx(busiest / inter)


@given(matrices(), st.floats(1e9, 1e12), st.floats(1e9, 1e12), st.integers(1, 8))
def test_faster_links_and_fewer_bytes_never_raise_the_bound(
    matrix: IntArray, intra: float, inter: float, gpus_per_node: int
) -> None:
    def seconds(matrix: IntArray, *speeds: float) -> float:
        bound = lower_bound(matrix, cluster(speeds[0], speeds[1], gpus_per_node, speeds[2]))
        assert bound is not None
        return bound.seconds

    base = seconds(matrix, intra, inter, intra)
    assert seconds(matrix, 2 * intra, inter, intra) <= base
    assert seconds(matrix, intra, 2 * inter, intra) <= base
    assert seconds(matrix // 2, intra, inter, intra) <= base
