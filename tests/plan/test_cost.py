"""Costs of small plans, by hand."""

from __future__ import annotations

import json

import pytest

from refit.plan.box import Box
from refit.plan.cost import bytes_matrix, cost_of, summary
from refit.plan.inventory import Census, Inventory, TensorSpec
from refit.plan.planner import plan_refit

WEIGHT = TensorSpec("weight", (8, 4), "bfloat16")
NORM = TensorSpec("norm", (4,), "float32")


def rows(begin: int, end: int) -> tuple[TensorSpec, Box]:
    return WEIGHT, Box((begin, 0), (end - begin, 4))


def census(holdings: dict[int, list[tuple[TensorSpec, Box]]]) -> Census:
    return Census.from_inventories({rank: Inventory.of(parts) for rank, parts in holdings.items()})


def test_disjoint_ranks() -> None:
    """Two sources of half a tensor each, three quarters of it to one destination, a quarter to the other."""
    plan = plan_refit(
        census({0: [rows(0, 4)], 1: [rows(4, 8)]}),
        census({2: [rows(0, 6)], 3: [rows(6, 8)]}),
    )
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes, cost.num_transfers) == (64, 64, 0, 3)
    assert dict(cost.sent) == {0: 32, 1: 32}
    assert dict(cost.received) == {2: 48, 3: 16}
    assert (cost.busiest_sender.rank, cost.busiest_sender.nbytes) == (0, 32)
    assert (cost.busiest_receiver.rank, cost.busiest_receiver.nbytes) == (2, 48)
    assert cost.sender_imbalance == 1.0
    assert cost.lower_bound_s(24.0) == 2.0
    assert bytes_matrix(plan).tolist() == [[0, 0, 32, 0], [0, 0, 16, 16], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_shared_ranks_copy_locally_what_they_hold() -> None:
    """Rank 0 keeps its half and needs the other; rank 1 is no destination."""
    plan = plan_refit(census({0: [rows(0, 4)], 1: [rows(4, 8)]}), census({0: [rows(0, 8)]}))
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes) == (64, 32, 32)
    assert dict(cost.sent) == {0: 0, 1: 32}
    assert dict(cost.received) == {0: 32}
    assert dict(cost.local) == {0: 32}
    assert cost.sender_imbalance == 2.0


def test_nothing_on_the_wire() -> None:
    plan = plan_refit(census({0: [rows(0, 8)]}), census({0: [rows(0, 8)]}))
    cost = cost_of(plan)
    assert (cost.wire_bytes, cost.local_bytes, cost.sender_imbalance, cost.busiest_bytes) == (0, 64, 1.0, 0)
    assert cost.lower_bound_s(1e9) == 0.0


def test_padding_is_payload_that_nobody_sends() -> None:
    short = TensorSpec("vocabulary", (6, 4), "bfloat16", padded=True)
    long = TensorSpec("vocabulary", (8, 4), "bfloat16", padded=True)
    plan = plan_refit(census({0: [(short, Box.whole((6, 4)))]}), census({1: [(long, Box.whole((8, 4)))]}))
    cost = cost_of(plan)
    assert (cost.payload_bytes, cost.wire_bytes, cost.local_bytes, cost.num_transfers) == (64, 48, 0, 1)


def test_dtypes_count_at_their_size() -> None:
    plan = plan_refit(census({0: [(NORM, Box.whole((4,)))]}), census({1: [(NORM, Box.whole((4,)))]}))
    assert cost_of(plan).wire_bytes == 16


def test_the_summary_is_plain_json() -> None:
    plan = plan_refit(census({0: [rows(0, 4)], 1: [rows(4, 8)]}), census({0: [rows(0, 8)]}))
    read = json.loads(json.dumps(summary(plan)))
    assert read["payload"] == read["wire"] + read["local"] == 64
    assert read["busiest"] == 32
    assert read["sent_by_rank"] == {"0": 0, "1": 32}
    assert read["source_weights_by_rank"] == {"0": 32, "1": 32}
    assert read["sender_imbalance"] == pytest.approx(2.0)
