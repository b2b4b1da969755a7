"""Codes and scales are written once, where they belong, and staged only for ranks that cannot be written."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.bench import oracle
from refit.config.quantisation import BLOCK_FORMATS, Quantisation, scale_key
from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy
from refit.encodings.fp8.live import LiveFp8
from refit.encodings.fp8.made import Places
from refit.encodings.fp8.oracle import Fp8Part
from refit.encodings.fp8.wire import wire_shardings
from refit.errors import RefitError
from refit.memory.weights import LocalWeights, new_shard, refresh_all
from refit.plan.box import Box
from refit.plan.planner import plan_refit
from refit.plan.quantised import Grid, quantised_sharding
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.transport.encoded import EncodedProgram
from refit.transport.messages import Framing
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.in_place import InPlaceBuffers
from refit.transport.schedule import make_schedule
from refit.transport.turns import in_turn
from tests.encodings.fp8 import test_program
from tests.encodings.fp8.test_program import Case, bound, live, random_sides
from tests.encodings.peers import ThreadPeers
from tests.ranks.pool import RankPool
from tests.transport.test_one_sided import SharedAddresses, World, in_threads
from tests.transport.test_transports import EXECUTORS

pytestmark = pytest.mark.no_megatron

RULES = [Quantisation(name, next(iter(block.rules))) for name, block in BLOCK_FORMATS.items()]
FC = TensorSpec("fc.weight", (4, 512, 256), "bfloat16", stacked=True)
NORM = TensorSpec("norm.weight", (256,), "bfloat16")
FC_BYTES = 4 * 512 * 256


def side(rows: dict[int, tuple[int, int]]) -> Sharding:
    """Each rank holds these rows of FC, and NORM."""
    return Sharding.from_ranks(
        {
            rank: RankSharding.of([(FC, Box.whole(FC.shape).narrow(1, *cut)), (NORM, Box.whole(NORM.shape))])
            for rank, cut in rows.items()
        }
    )


def staged_bytes(case: Case) -> int:
    """What the encoding has allocated on this rank."""
    (encoding,) = case.program._live
    assert isinstance(encoding, LiveFp8)
    return encoding.staging_bytes


def refits(
    rank: int, source: Sharding, destination: Sharding, way: tuple[str, str], quantisation: Quantisation, pieces: int
) -> Any:
    """Wrong elements of two refits, bytes staged by the encoding, and the dtypes that copies read."""
    copied: list[str] = []
    original = CopyBatch.__init__

    def noted(self: CopyBatch, copies: Any, **settings: Any) -> None:
        found: list[Copy] = list(copies)
        copied.extend(str(copy.source.dtype) for copy in found)
        original(self, found, **settings)

    with mock.patch.object(CopyBatch, "__init__", noted):
        case = bound(rank, source, destination, way, quantisation, pieces)
        wrong = test_program.wrong_in_two_refits(case, quantisation)
    found = staged_bytes(case)
    case.program.close()
    return wrong, found, sorted(set(copied))


@pytest.mark.parametrize("way", EXECUTORS, ids="-".join)
@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.dtype)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_collocated_refit_stages_and_copies_no_codes(
    ranks: RankPool, way: tuple[str, str], quantisation: Quantisation, pieces: int
) -> None:
    both = side({0: (0, 256), 1: (256, 512)})
    for wrong, staged, copied in ranks.run(refits, both, both, way, quantisation, pieces)[:2]:
        assert (wrong, staged, copied) == ({}, 0, ["torch.bfloat16"])


@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.dtype)
def test_what_is_sent_too_is_sent_from_where_it_belongs(ranks: RankPool, quantisation: Quantisation) -> None:
    source, destination = side({0: (0, 256), 1: (256, 512)}), side({0: (0, 512), 2: (0, 512)})
    answers = ranks.run(refits, source, destination, ("gloo", "ring"), quantisation, 1)
    assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS
    staged = [staged for _, staged, _ in answers]
    assert staged[0] == 0, "all that rank 0 sends it holds as well"
    assert FC_BYTES // 2 < staged[1] < FC_BYTES // 2 * 1.04, "its codes and scales, once for both readers"


@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.dtype)
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_one_peer_wants_is_made_in_its_weights(ranks: RankPool, quantisation: Quantisation, pieces: int) -> None:
    source, destination = side({0: (0, 256), 1: (256, 512)}), side({2: (0, 128), 3: (128, 384), 4: (384, 512)})
    answers = ranks.run(refits, source, destination, ("shm", "direct"), quantisation, pieces)
    assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS
    assert [(staged, copied) for _, staged, copied in answers[:2]] == [(0, ["torch.bfloat16"])] * 2


def test_what_several_peers_want_is_made_once_in_staging(ranks: RankPool) -> None:
    source, destination = side({0: (0, 512)}), side({1: (0, 512), 2: (0, 256), 3: (256, 384)})
    answers = ranks.run(refits, source, destination, ("shm", "direct"), RULES[0], 1)
    assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS
    assert FC_BYTES * 3 // 4 < answers[0][1] < FC_BYTES * 0.78, "rows 384 to 512 are written in place"


def refits_in_place(
    source: Sharding,
    destination: Sharding,
    quantisation: Quantisation,
    moving: int | None,
    rank: int,
    world: World,
    problems: list[str],
) -> None:
    """Four refits over InPlaceBuffers, of weights whose storages on rank `moving` are new before each but the first."""
    memory = SharedAddresses(rank, world, mapped=True)
    held = quantised_sharding(destination, quantisation)
    wire = wire_shardings(source, held, quantisation)
    plan = plan_refit(wire.source, wire.destination)
    mine, theirs = live(source, rank, 1), None
    if rank in held.ranks:
        theirs = LocalWeights(
            new_shard(each.tensor, box, torch.device("cpu"))
            for each in held.of_rank(rank).shards.values()
            for box in each.boxes
        )

    def prepare(a: LocalWeights | None, b: LocalWeights | None) -> OneSidedProgram:
        schedule = in_turn(make_schedule(plan, rank, Framing(1 << 14, None)), plan)  # cuts blocks
        return OneSidedProgram(schedule, memory, InPlaceBuffers(memory, schedule, b, None), a, b, 100.0)

    try:
        program = EncodedProgram(plan, {"fp8": wire}, ThreadPeers(rank), mine, theirs, prepare)
        for iteration in range(4):
            if iteration and rank == moving:
                for shard in (*(mine or ()), *(theirs or ())):
                    shard.owner.data = shard.owner.data.clone()
            refresh_all(mine, theirs)
            if mine is not None:
                oracle.fill(mine, iteration, Fp8Part(quantisation))
            if theirs is not None:
                oracle.poison(theirs)
            program.run()
            if theirs is not None:
                verdict = oracle.check(theirs, source.tensors, iteration, part=Fp8Part(quantisation))
                problems += [f"{rank}, run {iteration}: {each.key}" for each in verdict.wrong]
        if mine is not None and program.staging_bytes > 0:
            problems.append(f"{rank} stages {program.staging_bytes} bytes")
        program.close()
    except Exception as error:
        problems.append(f"{rank}: {error!r}")
        world.gate.abort()


@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.dtype)
@pytest.mark.parametrize("moving", [None, 0, 1, 2, 3])
def test_a_peer_whose_weights_have_moved_is_written_where_they_are(
    quantisation: Quantisation, moving: int | None
) -> None:
    """Rank 0 sends to rank 1, which is a source too, and to ranks 2 and 3."""
    source = side({0: (0, 256), 1: (256, 512)})
    destination = side({1: (0, 128), 2: (128, 384), 3: (384, 512)})
    # Phases are those of a process's main thread.
    with mock.patch("refit.encodings.fp8.groups.counted_apart", return_value=nullcontext()):
        in_threads(partial(refits_in_place, source, destination, quantisation, moving), 4)


def nan_is_named(rank: int, quantisation: Quantisation) -> str:
    both = side({0: (0, 512)})
    case = bound(rank, both, both, ("gloo", "ring"), quantisation)
    dist.barrier()
    found = ""
    if case.mine is not None:
        oracle.fill(case.mine, 0, Fp8Part(quantisation))
        next(iter(case.mine)).view[3, 100, 7] = float("nan")
        with pytest.raises(RefitError) as caught:
            case.program.run()
        found = str(caught.value)
    dist.barrier()
    return found


def test_a_tensor_that_is_not_finite_is_named(ranks: RankPool) -> None:
    found = ranks.run(nan_is_named, RULES[0])[0]
    assert "NaN or infinity" in found
    assert FC.key in found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(RULES))
def test_places_are_disjoint_and_hold_all_that_is_sent(seed: int, quantisation: Quantisation) -> None:
    source, destination = random_sides(seed, quantisation)
    held = quantised_sharding(destination, quantisation)
    wire = wire_shardings(source, held, quantisation)
    plan = plan_refit(wire.source, wire.destination)
    for rank in source.ranks:
        mine = live(source, rank, pieces=1)
        assert mine is not None
        theirs = None
        if rank in held.ranks:
            shards = held.of_rank(rank).shards.values()
            theirs = LocalWeights(new_shard(each.tensor, box, mine.device) for each in shards for box in each.boxes)
        part = plan.for_rank(rank)
        places = Places(wire.tensors, quantisation.format, mine, theirs, rank, part)
        everything = [*places.homes, *places.shadows]
        for one, other in itertools.combinations(everything, 2):
            assert one.tensor.key != other.tensor.key or one.box.intersect(other.box) is None
        made = LocalWeights(shard for each in everything for shard in (each.codes, each.scales))
        for transfer in (*part.sends, *part.local):
            key = transfer.tensor.key
            if key in wire.tensors or key in map(scale_key, wire.tensors):
                assert sum(view.box.volume for view in made.views(key, transfer.box)) == transfer.box.volume
        for home in places.homes:
            assert theirs is not None
            assert Grid(home.tensor.shape, quantisation.format).is_aligned(home.box)
            assert theirs.views(home.tensor.key, home.box)[0].data.data_ptr() == home.codes.view.data_ptr()
