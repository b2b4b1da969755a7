"""Refits that quantise, on eight ranks: random cuts of random shapes, over both executors, verified by the oracle."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from refit.bench import oracle
from refit.config.layout import Layout
from refit.config.quantisation import BLOCK_FORMATS, Place, Quantisation
from refit.config.side import SideSpec
from refit.models.sharded_model import WithoutSteps
from refit.models.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.quantised import quantised_sharding
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.predict.sides import plan_sides
from refit.quantise.program import QuantisingProgram
from refit.quantise.weights import QuantisedModel
from refit.transport.base import TransportOptions, get_transport
from tests.ranks.pool import RankPool

RANKS = 8


class Model(WithoutSteps):
    """A ShardedModel of these weights."""

    def __init__(self, weights: LocalWeights | None) -> None:
        self.weights = weights

    def check_forward(self) -> None:
        pass

    def forward(self, tokens: torch.Tensor) -> None:
        return None


def cut(shape: tuple[int, ...], dim: int, unit: int, dice: random.Random, ranks: range) -> dict[int, list[Box]]:
    """Each of `ranks` holds one of several parts along `dim`, cut at multiples of `unit`; parts may have replicas."""
    most = (shape[dim] - 1) // unit
    cuts = sorted(unit * each for each in dice.sample(range(1, most + 1), min(most, dice.randint(0, len(ranks) - 1))))
    ends = [*cuts, shape[dim]]
    parts = [Box.whole(shape).narrow(dim, a, b) for a, b in zip([0, *cuts], ends, strict=True)]
    return {rank: [parts[index % len(parts)]] for index, rank in enumerate(ranks)}


def random_sides(seed: int, quantisation: Quantisation) -> tuple[Sharding, Sharding]:
    """Unquantised shardings of both sides."""
    dice = random.Random(seed)
    block = quantisation.format
    source_ranks = range(dice.choice([3, 4]))
    destination_ranks = range(4, 8) if dice.random() < 0.6 else range(5)
    sides: list[dict[int, list[tuple[TensorSpec, Box]]]] = [
        {r: [] for r in source_ranks},
        {r: [] for r in destination_ranks},
    ]
    for number in range(4):
        ragged = 0 if block.whole else dice.choice([0, 40])
        leading = dice.choice([(), (3,)])
        shape = (*leading, dice.randint(1, 4) * block.rows + ragged, dice.randint(1, 4) * block.columns + ragged)
        name = "router.weight" if number == 3 else "fc.weight"
        tensor = TensorSpec(f"layers.{number}.{name}", shape, "bfloat16", stacked=bool(leading))
        for held, on_grid in zip(sides, (False, True), strict=True):
            dim = dice.choice([len(shape) - 2, len(shape) - 1])
            steps = (block.rows, block.columns)
            unit = steps[dim - len(shape) + 2] if on_grid else dice.choice([1, 16, 64])
            for rank, boxes in cut(shape, dim, unit, dice, range(min(held), max(held) + 1)).items():
                held[rank] += [(tensor, box) for box in boxes]
    source, destination = (
        Sharding.from_ranks({rank: RankSharding.of(parts) for rank, parts in held.items()}) for held in sides
    )
    return source, destination


def live(sharding: Sharding, rank: int, pieces: int) -> LocalWeights | None:
    """New weights of `rank`, each box in up to `pieces` shards with storages of their own."""
    if rank not in sharding.ranks:
        return None
    shards = []
    for shard in sharding.of_rank(rank).shards.values():
        for box in shard.boxes:
            for part in box.split(pieces):
                data = torch.zeros(part.extents, dtype=torch.bfloat16)
                shards.append(LocalShard(shard.tensor, part, data, data))
    return LocalWeights(shards)


def refit_twice(rank: int, seed: int, method: str, quantisation: Quantisation, spoil: str = "") -> Any:
    """Wrong elements of two refits on this rank, by tensor, and the blocks quantised at each place."""
    source, destination = random_sides(seed, quantisation)
    held = quantised_sharding(destination, quantisation)
    side = SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1), quantisation=quantisation)
    planned = plan_sides(source, held, side, None)
    assert planned.wire is not None
    mine = live(source, rank, pieces=1 + seed % 2)
    theirs = QuantisedModel(Model(live(destination, rank, pieces=1)), quantisation).weights
    if theirs is not None:
        assert held.of_rank(rank).differences(theirs.rank_sharding) == []
    transport = get_transport(method)
    options = TransportOptions(staging_bytes=1 << 16, timeout_s=60.0)
    rule = quantisation if not spoil else replace(quantisation, rule=spoil)
    program = QuantisingProgram(
        planned.plan,
        planned.wire,
        rule,
        rank,
        mine,
        theirs,
        lambda a, b: transport.prepare(planned.plan, a, b, options),
    )
    wrong: dict[str, int] = {}
    for iteration in range(2):
        if mine is not None:
            oracle.fill(mine, iteration, quantisation)
        if theirs is not None:
            oracle.poison(theirs)
        dist.barrier()
        report = program.run()
        dist.barrier()
        assert {"quantise", "quantise arrived"} <= set(report.phases_s)
        if theirs is not None:
            verdict = oracle.check(theirs, source.tensors, iteration, quantisation=quantisation)
            elements = sum(shard.view.numel() for shard in theirs)
            assert verdict.num_compared == elements
            wrong |= {each.key: each.num_wrong for each in verdict.wrong}
    program.close()
    return wrong, (planned.wire.num_at_source, planned.wire.num_at_destination)


@pytest.mark.parametrize("method", ["gloo", "shm"])
def test_random_layouts_arrive_as_the_rule_says(ranks: RankPool, method: str) -> None:
    rules = [Quantisation(name, rule) for name, block in BLOCK_FORMATS.items() for rule in block.rules]
    places = [0, 0]
    for seed, quantisation in enumerate([*rules, *rules]):
        place = Place.DESTINATION if seed == 7 else Place.AUTO
        answers = ranks.run(refit_twice, seed, method, replace(quantisation, place=place))
        assert [wrong for wrong, _ in answers] == [{}] * RANKS, (seed, quantisation)
        places = [have + more for have, more in zip(places, answers[0][1], strict=True)]
    assert min(places) > 100, "both places were tried"


@pytest.mark.parametrize(("rule", "other"), [("amax", "amax-inverse"), ("amax", "pow2"), ("pow2", "amax")])
def test_another_rule_than_the_named_one_is_caught(ranks: RankPool, rule: str, other: str) -> None:
    answers = ranks.run(refit_twice, 3, "gloo", Quantisation("fp8-block", rule), other)
    assert any(key.endswith("_scale_inv") for wrong, _ in answers for key in wrong)
