"""First holders: who gets each box of a destination in the first stage, to pass it on in the second (`plan_refit`)."""

from __future__ import annotations

from collections.abc import Callable, Collection

from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding

Choice = Callable[[ReplicatedShard], Collection[int]]
"""Of a box and the ranks that hold it, those that get it first: at least one of them."""


def first_holders(source: Sharding, destination: Sharding, choose: Choice) -> Sharding:
    """`destination` with each box on the ranks of `choose` only, and on those that have it at the source already.

    The latter copy it, which costs no link anything; otherwise they would get it passed on. Both sides hold the same
    tensors.
    """
    # Layers of one kind share one object on either side, and here too.
    made: dict[tuple[int, int], TensorSharding] = {}
    by_key: dict[str, TensorSharding] = {}
    for key, wanted in destination.by_key.items():
        kind = (id(source.by_key[key]), id(wanted))
        if kind not in made:
            made[kind] = _restricted(source.by_key[key], wanted, choose)
        by_key[key] = made[kind]
    return Sharding(destination.ranks, destination.tensors, by_key)


def _restricted(source: TensorSharding, destination: TensorSharding, choose: Choice) -> TensorSharding:
    shards = []
    for shard in destination.shards:
        first = {*choose(shard), *_at_home(source, shard)}
        shards.append(ReplicatedShard(shard.box, tuple(rank for rank in shard.ranks if rank in first)))
    return TensorSharding(tuple(shards))


def _at_home(source: TensorSharding, shard: ReplicatedShard) -> set[int]:
    """The ranks of `shard` that hold its box at the source."""
    holders = {rank for held in source.shards if held.box.contains(shard.box) for rank in held.ranks}
    return holders & set(shard.ranks)
