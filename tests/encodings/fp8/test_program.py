"""Refits that quantise, on eight ranks: random cuts of random shapes, over both executors, verified by the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from refit.bench import oracle
from refit.config.layout import Layout
from refit.config.quantisation import BLOCK_FORMATS, Place, Quantisation
from refit.config.side import SideSpec
from refit.encodings.fp8.batch import QuantiseBatch
from refit.encodings.fp8.oracle import Fp8Part
from refit.encodings.fp8.wire import QuantisedWire
from refit.memory.weights import LocalShard, LocalWeights, refresh_all
from refit.models.forward_pass import ForwardPass
from refit.models.quantised import QuantisedModel
from refit.models.sharded_model import WithoutSteps
from refit.plan.box import Box
from refit.plan.quantised import quantised_sharding
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.predict.sides import plan_sides
from refit.transport.base import TransportOptions, get_transport
from refit.transport.encoded import EncodedProgram
from refit.transport.ranks import Ranks
from refit.transport.two_sided.gloo import GlooBackend
from tests.encodings.peers import ThreadPeers
from tests.ranks.pool import RankPool
from tests.transport.synthetic import own
from tests.transport.test_transports import BACKENDS

pytestmark = pytest.mark.no_megatron

RANKS = 8


class Model(WithoutSteps):
    """A ShardedModel of these weights."""

    def __init__(self, weights: LocalWeights | None) -> None:
        self.weights = weights

    def check_forward(self) -> None:
        pass

    def forward(self, tokens: torch.Tensor, replayed: Any = None) -> ForwardPass:
        return ForwardPass()


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
                shards.append(LocalShard(shard.tensor, part, data, data.detach()))
    return LocalWeights(shards)


@dataclass(frozen=True, slots=True)
class Case:
    """A program of one rank, the weights it moves, and the unquantised tensors of their shardings."""

    program: EncodedProgram
    mine: LocalWeights | None
    theirs: LocalWeights | None
    tensors: Mapping[str, TensorSpec]
    num_blocks: tuple[int, int]


def prepared(rank: int, seed: int, way: tuple[str, str], quantisation: Quantisation, spoil: str = "") -> Case:
    """`spoil` is a rule to follow in place of the named one."""
    source, destination = random_sides(seed, quantisation)
    return bound(rank, source, destination, way, quantisation, pieces=1 + seed % 2, spoil=spoil)


def bound(
    rank: int,
    source: Sharding,
    destination: Sharding,
    way: tuple[str, str],
    quantisation: Quantisation,
    pieces: int = 1,
    spoil: str = "",
) -> Case:
    """Of the unquantised shardings of both sides, with each box of the source in up to `pieces` shards."""
    held = quantised_sharding(destination, quantisation)
    side = SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1), quantisation=quantisation)
    planned = plan_sides(source, held, side, None)
    wire = planned.wires["fp8"]
    assert isinstance(wire, QuantisedWire)
    mine = live(source, rank, pieces)
    theirs = QuantisedModel(Model(live(destination, rank, pieces=1)), quantisation).weights
    if theirs is not None:
        assert held.of_rank(rank).differences(theirs.rank_sharding) == []
    transport, ranks = get_transport(way[0]), Ranks.of_default_group()
    options = TransportOptions(staging_bytes=1 << 16, timeout_s=60.0, own=own(*way), is_pipelined=True)
    rule = quantisation if not spoil else replace(quantisation, rule=spoil)
    program = EncodedProgram(
        planned.plan,
        {"fp8": replace(wire, quantisation=rule)},
        ThreadPeers(rank),
        mine,
        theirs,
        lambda a, b: transport.prepare(planned.plan, ranks, a, b, options),
    )
    return Case(program, mine, theirs, source.tensors, (wire.num_at_source, wire.num_at_destination))


def refit_twice(rank: int, seed: int, way: tuple[str, str], quantisation: Quantisation, spoil: str = "") -> Any:
    """Wrong elements of two refits on this rank, by tensor, and the blocks quantised at each place."""
    case = prepared(rank, seed, way, quantisation, spoil)
    wrong = wrong_in_two_refits(case, quantisation)
    case.program.close()
    return wrong, case.num_blocks


def wrong_in_two_refits(case: Case, quantisation: Quantisation) -> dict[str, int]:
    """Wrong elements on this rank, by tensor. Before the second refit all weights move into new memory."""
    wrong: dict[str, int] = {}
    for iteration in range(2):
        if iteration:
            for shard in (*(case.mine or ()), *(case.theirs or ())):
                shard.owner.data = shard.owner.data.clone()
        refresh_all(case.mine, case.theirs)
        if case.mine is not None:
            oracle.fill(case.mine, iteration, Fp8Part(quantisation))
        if case.theirs is not None:
            oracle.poison(case.theirs)
        dist.barrier()
        report = case.program.run()
        dist.barrier()
        assert {"quantise", "quantise arrived"} <= set(report.phases_s)
        if case.theirs is not None:
            verdict = oracle.check(case.theirs, case.tensors, iteration, part=Fp8Part(quantisation))
            assert verdict.num_compared == sum(shard.view.numel() for shard in case.theirs)
            wrong |= {each.key: each.num_wrong for each in verdict.wrong}
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("way", BACKENDS, ids="-".join)
def test_random_layouts_arrive_as_the_rule_says(ranks: RankPool, way: tuple[str, str]) -> None:
    rules = [Quantisation(name, rule) for name, block in BLOCK_FORMATS.items() for rule in block.rules]
    places = [0, 0]
    for seed, quantisation in enumerate([*rules, *rules]):
        place = Place.DESTINATION if seed == 7 else Place.AUTO
        answers = ranks.run(refit_twice, seed, way, replace(quantisation, place=place))
        assert [wrong for wrong, _ in answers] == [{}] * RANKS, (seed, quantisation)
        places = [have + more for have, more in zip(places, answers[0][1], strict=True)]
    assert min(places) > 100, "both places were tried"


@pytest.mark.parametrize(("rule", "other"), [("amax", "amax-inverse"), ("amax", "pow2"), ("pow2", "amax")])
def test_another_rule_than_the_named_one_is_caught(ranks: RankPool, rule: str, other: str) -> None:
    answers = ranks.run(refit_twice, 3, BACKENDS[0], Quantisation("fp8-block", rule), other)
    assert any(key.endswith("_scale_inv") for wrong, _ in answers for key in wrong)


def order_of_work(rank: int, seed: int, quantisation: Quantisation) -> list[str]:
    """What this rank does in a refit, in order: `quantise` a group, `post` a round of messages, `unpack` one."""
    case = prepared(rank, seed, BACKENDS[0], quantisation)
    done: list[str] = []
    with ExitStack() as stack:
        for owner, name, label in ((QuantiseBatch, "run", "quantise"), *STEPS):
            original = getattr(owner, name)
            noted = partial(_noted, done, label, original)
            stack.enter_context(mock.patch.object(owner, name, lambda *args, noted=noted: noted(*args)))
        case.program.run()
    case.program.close()
    return done


STEPS = ((GlooBackend, "post", "post"), (GlooBackend, "unpack", "unpack"))


def _noted(done: list[str], label: str, function: Callable[..., None], *args: Any) -> None:
    done.append(label)
    function(*args)


@pytest.mark.parametrize("place", [Place.AUTO, Place.DESTINATION])
def test_quantising_takes_turns_with_the_wire(ranks: RankPool, place: Place) -> None:
    """Sources post messages before they quantise all, destinations quantise before the last message has come."""
    num_beside = 0
    for seed in (1, 5, 6):
        for done in ranks.run(order_of_work, seed, Quantisation("fp8-block", "amax", place=place)):
            moves = [number for number, step in enumerate(done) if step != "quantise"]
            quantised = [number for number, step in enumerate(done) if step == "quantise"]
            num_beside += sum(moves[0] < number < moves[-1] for number in quantised) if moves else 0
    assert num_beside > 20
