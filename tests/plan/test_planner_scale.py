"""Plans of many layers on many ranks: what they cost follows geometries and ranks."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from refit.cli.parsing import parse
from refit.plan.box import Box
from refit.plan.cost import cost_of
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec
from refit.predict.sides import predict_side


def layered(num_layers: int, ranks: range, shape: tuple[int, ...], held: TensorSharding) -> Sharding:
    """`num_layers` tensors of one sharding."""
    specs = {key: TensorSpec(key, shape, "bfloat16") for key in (f"layer{layer}" for layer in range(num_layers))}
    return Sharding(tuple(ranks), specs, dict.fromkeys(specs, held))


def row_shards(rows: int, width: int, ranks: range, replicas: int, strided: int) -> TensorSharding:
    """FSDP's cut of dim 0 into ceil(rows / shards) rows per shard, the last ones short or empty.

    Each run of `ranks` holds all of it, `replicas` runs. The rows stand for others: a fused tensor of `strided` parts
    has row `i` of part `p` as its row `i * strided + p`, so a shard holds a box of every part.
    """
    num_shards, part = len(ranks) // replicas, rows // strided
    size = -(-rows // num_shards)
    shards = []
    for shard in range(num_shards):
        begin, end = min(shard * size, rows), min((shard + 1) * size, rows)
        holders = tuple(ranks[shard + replica * num_shards] for replica in range(replicas))
        for p in range(strided):
            low, high = -(-(begin - p) // strided), -(-(end - p) // strided)
            if low < high:
                shards.append(ReplicatedShard(Box((p * part + low, 0), (high - low, width)), holders))
    return TensorSharding(tuple(shards))


def column_parallel(rows: int, width: int, ranks: range) -> TensorSharding:
    size = rows // len(ranks)
    return TensorSharding(
        tuple(ReplicatedShard(Box((i * size, 0), (size, width)), (rank,)) for i, rank in enumerate(ranks))
    )


def row_shards_to_tp16(num_layers: int, strided: int, replicas: int = 1) -> RefitPlan:
    """256 row shards per replica of `[10016, 4096]` to TP16. 250 shards hold 40 rows, the next 16 and 5 none."""
    shape, sources = (10016, 4096), range(256 * replicas)
    destinations = range(len(sources), len(sources) + 16)
    source = layered(num_layers, sources, shape, row_shards(*shape, sources, replicas, strided))
    return plan_refit(source, layered(num_layers, destinations, shape, column_parallel(*shape, destinations)))


@pytest.mark.parametrize("strided", [1, 4])
def test_hundreds_of_uneven_row_shards_become_tp16(strided: int) -> None:
    plan = row_shards_to_tp16(60, strided)
    cost = cost_of(plan)
    assert cost.received_by_rank == plan.destination_sharding.bytes_per_rank
    assert cost.sent_by_rank == plan.source_sharding.bytes_per_rank
    # 15 inner borders of the 16 parts fall within a shard's rows, or between them.
    assert 251 <= len(plan) // strided <= 251 + 15
    assert len(plan) == len(row_shards_to_tp16(1, strided))


@pytest.mark.parametrize("strided", [1, 4])
def test_replicas_of_row_shards_send_even_parts(strided: int) -> None:
    """One layer's pieces are less than a cut, so replicas take turns by layers."""
    plan = row_shards_to_tp16(60, strided, replicas=2)
    sent = np.array(list(cost_of(plan).sent_by_rank.values())).reshape(2, 256)
    held = np.array(list(plan.source_sharding.bytes_per_rank.values())).reshape(2, 256)
    assert sent.sum(0).tolist() == held[0].tolist()
    assert sent.max() <= 1.05 * held.max() / 2
    assert len(plan) <= 4 * len(row_shards_to_tp16(1, strided))


def kimi_k2(world_size: int, source_ep: int, destination_ep: int) -> RefitPlan:
    flags = f"""--model kimi_k2 --refit-method nccl --tensor-model-parallel-size 8
        --expert-model-parallel-size {source_ep} --source-world-size {world_size}
        --rl-inference-tensor-model-parallel-size 8 --rl-inference-expert-model-parallel-size {destination_ep}
        --destination-world-size {world_size}"""
    scenario = parse(shlex.split(flags)).scenario
    assert scenario.model is not None
    return plan_refit(*(predict_side(scenario.model, side) for side in scenario.sides.values()), ranks_per_node=8)


def test_512_ranks_to_512_take_few_routes_and_few_peers() -> None:
    """Every rank's dense part comes from one or two replicas, not a share from each of the 64."""
    plan = kimi_k2(512, 64, 32)
    cost = cost_of(plan)
    assert len(plan) < 64 * 1024
    assert cost.num_transfers > 4 * len(plan)
    assert cost.sender_imbalance <= 1.01
    pairs = {(source, destination) for source, destination in zip(plan.source, plan.destination, strict=True)}
    assert len(pairs) < 4 * 1024


def test_both_ends_of_a_pair_list_its_transfers_in_one_order() -> None:
    plan = row_shards_to_tp16(3, 4, replicas=2)
    receives = plan.for_rank(512).receives
    for rank in {transfer.source for transfer in receives}:
        sends = [transfer for transfer in plan.for_rank(rank).sends if transfer.destination == 512]
        assert sends == [transfer for transfer in receives if transfer.source == rank]
