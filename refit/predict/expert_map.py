"""Which experts each rank of a side holds, read off its sharding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from refit.plan.sharding import Sharding, TensorSharding, TensorSpec

FIRST_LINEAR = ".linear_fc1.weight"
"""The end of the key of the routed experts' first linear, `decoder.layers.N.mlp.experts.experts.linear_fc1.weight`."""


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """The experts of some layers with the same placement: rank -> its experts, ascending.

    `share` is the part of each expert that a rank holds: 1 for whole ones, else 1/slices.
    """

    layers: tuple[int, ...]
    experts_of: Mapping[int, tuple[int, ...]]
    num_experts: int
    share: float


def expert_maps(sharding: Sharding) -> tuple[ExpertMap, ...]:
    """One map for each placement of a side, in the order of their first layers. Empty for a model without experts."""
    layers: dict[int, list[int]] = defaultdict(list)
    found: dict[int, tuple[TensorSpec, TensorSharding]] = {}
    known: dict[int, TensorSharding] = {}
    equal: dict[TensorSharding, TensorSharding] = {}  # layers of several kinds have objects of their own
    for key, tensor in sharding.tensors.items():
        if tensor.stacked and key.endswith(FIRST_LINEAR) and key.startswith("decoder.layers."):
            each = sharding.by_key[key]
            if id(each) not in known:
                known[id(each)] = equal.setdefault(each, each)
            held = known[id(each)]
            layers[id(held)].append(int(key.split(".")[2]))
            found[id(held)] = (tensor, held)
    return tuple(_map(tuple(layers[identity]), *found[identity]) for identity in found)


def _map(layers: tuple[int, ...], tensor: TensorSpec, held: TensorSharding) -> ExpertMap:
    experts: dict[int, set[int]] = defaultdict(set)
    volume: dict[int, int] = defaultdict(int)
    for shard in held.shards:
        for rank in shard.ranks:
            experts[rank] |= set(range(shard.box.offsets[0], shard.box.ends[0]))
            volume[rank] += shard.box.volume
    per_expert = tensor.nbytes // tensor.itemsize // tensor.shape[0]
    some = min(experts)
    share = volume[some] / (len(experts[some]) * per_expert)
    by_rank = {rank: tuple(sorted(experts[rank])) for rank in sorted(experts)}
    return ExpertMap(layers, by_rank, tensor.shape[0], share)
