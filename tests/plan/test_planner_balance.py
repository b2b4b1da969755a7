"""Which replica sends: local first, then the same node, then the least loaded, as even as the layout allows."""

from __future__ import annotations

import shlex
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.plan.box import Box
from refit.plan.box_array import BoxArray, IntArray, touching
from refit.plan.pieces import find_pieces
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.senders import level
from refit.plan.sharding import RankSharding, ReplicatedShard, Sharding, TensorSharding, TensorSpec
from refit.plan.tensor_class import tensor_classes
from refit.predict.megatron import predict
from tests.plan.strategies import sides

RANKS_PER_NODE = 8

KIMI_K2_SUITE = [
    ("8:8:8:4", "non-collocated"),
    ("16:4:8:4", "non-collocated"),
    ("16:4:16:2", "non-collocated"),
    ("16:4:32:2", "non-collocated"),
    ("8:8:16:4", "non-collocated"),
    ("32:4:16:8", "collocated"),
]
TP1_SOURCES = [
    (layouts, mode)
    for layouts in ("1:8:2:4", "1:8:4:8", "1:8:1:16", "1:16:8:2", "1:32:4:16", "1:64:4:8")
    for mode in ("collocated", "non-collocated")
]
LIMITED = [
    ("16:8:8:16", "collocated", 16 / 15),
    ("1:16:1:8", "collocated", 16 / 15),
    ("1:8:1:1", "collocated", 8 / 7),
]
"""Kimi K2 refits whose busiest sender cannot be nearer to the mean, with the least ratio.

The first: only 16 of 128 ranks keep half of their weights, so the mean is 15/16 of what each of the others must send.
"""


def plan_of(layouts: str, mode: str) -> RefitPlan:
    """The plan for Kimi K2 of `layouts`, SRC_TP:SRC_EP:DST_TP:DST_EP."""
    source_tp, source_ep, destination_tp, destination_ep = layouts.split(":")
    flags = f"""--model kimi_k2 --refit-mode {mode} --refit-method nccl
        --tensor-model-parallel-size {source_tp} --expert-model-parallel-size {source_ep}
        --rl-inference-tensor-model-parallel-size {destination_tp}
        --rl-inference-expert-model-parallel-size {destination_ep}"""
    scenario = parse(shlex.split(flags)).scenario
    assert scenario.model is not None
    sides = (predict(scenario.model, layout) for layout in (scenario.source, scenario.destination))
    return plan_refit(*sides, ranks_per_node=RANKS_PER_NODE)


def sent(plan: RefitPlan) -> IntArray:
    """Wire bytes each source rank sends, in the order of its side."""
    by_rank = np.bincount(plan.source[plan.is_wire], plan.nbytes[plan.is_wire], 1 + max(plan.source_sharding.ranks))
    return by_rank[list(plan.source_sharding.ranks)].astype(np.int64)


def least_busiest_sender(plan: RefitPlan) -> float:
    """Bytes that some sender sends at least, in any plan.

    Two ranks are linked where one sends what the other holds too. What a set of linked ranks sends, no rank outside
    holds and no receiver holds itself: all of it must leave the set, so one in it sends the set's mean or more.
    """
    leader = {rank: rank for rank in plan.source_sharding.ranks}

    def find(rank: int) -> int:
        while leader[rank] != rank:
            rank = leader[rank]
        return rank

    for number, tensors in enumerate(plan.classes):
        routes = np.flatnonzero(plan.is_wire & (plan.tensor_class == number))
        boxes = plan.boxes[routes]
        parts = BoxArray(boxes.offsets[:, 1 : tensors.dims], boxes.ends[:, 1 : tensors.dims])
        linked = zip(*touching(parts, tensors.source.boxes), strict=True)
        for source, shard in {(int(plan.source[routes[part]]), int(box)) for part, box in linked}:
            for rank in tensors.source.shards[shard].ranks:
                leader[find(rank)] = find(source)
    sets = defaultdict(list)
    for rank, nbytes in zip(plan.source_sharding.ranks, sent(plan).tolist(), strict=True):
        sets[find(rank)].append(nbytes)
    return max(sum(loads) / len(loads) for loads in sets.values())


@pytest.mark.parametrize(("layouts", "mode"), KIMI_K2_SUITE + TP1_SOURCES)
def test_no_sender_has_5_percent_more_than_the_mean(layouts: str, mode: str) -> None:
    loads = sent(plan_of(layouts, mode))
    assert loads.max() <= 1.05 * loads.mean()


@pytest.mark.parametrize(("layouts", "mode", "ratio"), LIMITED)
def test_where_senders_cannot_be_even_the_busiest_sends_no_more_than_it_must(
    layouts: str, mode: str, ratio: float
) -> None:
    plan = plan_of(layouts, mode)
    loads, least = sent(plan), least_busiest_sender(plan)
    assert least / loads.mean() == pytest.approx(ratio, rel=0.001)
    assert loads.max() <= 1.001 * least


def replicas(tensors: dict[str, tuple[int, tuple[int, ...]]], ranks: tuple[int, ...]) -> Sharding:
    """A side of `ranks`; each tensor is a number of MB and the ranks that hold all of it."""
    specs = {key: TensorSpec(key, (mb, 500_000), "bfloat16") for key, (mb, _) in tensors.items()}
    by_key = {
        key: TensorSharding((ReplicatedShard(Box.whole(specs[key].shape), held),)) for key, (_, held) in tensors.items()
    }
    return Sharding(ranks, specs, by_key)


def test_pieces_with_fewer_choices_are_placed_first() -> None:
    """400 small tensors that only ranks 0 and 1 hold, a large one that 2 and 3 hold as well: 600 MB from each."""
    small = {f"small{i}": 3 for i in range(400)}
    source = replicas({"large": (1200, (0, 1, 2, 3))} | {key: (mb, (0, 1)) for key, mb in small.items()}, (0, 1, 2, 3))
    destination = replicas({key: (mb, (4,)) for key, mb in ({"large": 1200} | small).items()}, (4,))
    loads = sent(plan_refit(source, destination))
    assert loads.max() <= 1.02 * loads.mean()


def test_what_only_one_rank_on_the_node_holds_counts_before_remote_choices() -> None:
    """Nodes of 2. Rank 1 must serve its neighbour 0's 60 small pieces; so rank 3 alone sends the large one to node
    2."""
    small = {f"small{i}": 1 for i in range(60)}
    source = replicas({key: (mb, (1, 3)) for key, mb in small.items()} | {"large": (60, (1, 3))}, (1, 3))
    destination = replicas({key: (mb, (0,)) for key, mb in small.items()} | {"large": (60, (4,))}, (0, 4))
    plan = plan_refit(source, destination, ranks_per_node=2)
    assert set(plan.source[plan.destination == 0].tolist()) == {1}
    assert set(plan.source[plan.destination == 4].tolist()) == {3}


@given(sides(), st.integers(2, 4))
def test_bytes_cross_nodes_only_where_no_replica_is_near(pair: tuple[Sharding, Sharding], ranks_per_node: int) -> None:
    for transfer in plan_refit(*pair, ranks_per_node=ranks_per_node).transfers():
        node = transfer.destination // ranks_per_node
        if transfer.source // ranks_per_node != node:
            tensor_sharding = pair[0].by_key[transfer.tensor.key]
            holders = {
                rank for held in tensor_sharding.shards if held.box.intersect(transfer.box) for rank in held.ranks
            }
            assert all(rank // ranks_per_node != node for rank in holders)


def test_a_loaded_replica_on_the_node_is_still_preferred_to_an_idle_one_elsewhere() -> None:
    source = replicas({"near": (50, (2, 4)), "busy": (50, (2,))}, (2, 4))
    destination = replicas({"near": (50, (3,)), "busy": (50, (3,))}, (3,))
    assert set(plan_refit(source, destination, ranks_per_node=2).source.tolist()) == {2}
    assert set(plan_refit(source, destination).source.tolist()) == {2, 4}


def test_a_rank_copies_its_own_replica_though_it_has_little_to_send() -> None:
    source = replicas({"both": (50, (0, 1)), "only": (50, (1,))}, (0, 1))
    destination = replicas({"both": (50, (0, 1)), "only": (50, (0,))}, (0, 1))
    plan = plan_refit(source, destination)
    assert sent(plan).tolist() == [0, 50_000_000]


def test_the_worked_example_of_the_senders() -> None:
    """Rows of 4 MiB. Rank 0 also sends two that only it holds, so it sends five of the twelve that rank 1 has too."""
    width = 4 << 20
    shared, own = TensorSpec("shared", (12, width), "int8"), TensorSpec("own", (2, width), "int8")
    held = {0: [(shared, Box.whole(shared.shape)), (own, Box.whole(own.shape))], 1: [(shared, Box.whole(shared.shape))]}
    ends = {4: (0, 6), 5: (6, 10), 6: (10, 12)}
    wanted = {rank: [(shared, Box.whole(shared.shape).narrow(0, *rows))] for rank, rows in ends.items()}
    wanted[7] = [(own, Box.whole(own.shape))]
    source, destination = (
        Sharding.from_ranks({rank: RankSharding.of(parts) for rank, parts in side.items()}) for side in (held, wanted)
    )
    found = {
        (t.box.offsets[0], t.box.ends[0], t.source, t.destination)
        for t in plan_refit(source, destination).transfers()
        if t.tensor.key == "shared"
    }
    assert found == {(0, 5, 0, 4), (5, 6, 1, 4), (6, 10, 1, 5), (10, 12, 1, 6)}
    assert level(np.array([5, 1, 2]), 6).tolist() == [0, 4, 2]


def test_the_worked_example_of_who_may_send() -> None:
    """Ranks 0, 1 and 5 hold a tensor that all of 0 to 7 need, four ranks to a node."""
    spec = TensorSpec("w", (8, 4), "bfloat16")
    source, destination = (
        Sharding.from_ranks({rank: RankSharding.of([(spec, Box.whole(spec.shape))]) for rank in ranks})
        for ranks in ((0, 1, 5), range(8))
    )
    pieces = find_pieces(tensor_classes((source, destination)), ranks_per_node=4)
    sets = {
        int(rank): pieces.holder_sets[holders] for rank, holders in zip(pieces.destination, pieces.holders, strict=True)
    }
    near, far = (0, 1), (5,)
    assert sets == {0: (0,), 1: (1,), 2: near, 3: near, 4: far, 5: far, 6: far, 7: far}
