"""Codes and scales are written once, where they belong, and staged only for ranks that cannot be written."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
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
from refit.memory.weights import LocalWeights, new_shard
from refit.plan.box import Box
from refit.plan.planner import plan_refit
from refit.plan.quantised import Grid, quantised_sharding
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from tests.encodings.fp8 import test_program
from tests.encodings.fp8.test_program import Case, bound, live, random_sides
from tests.ranks.pool import RankPool

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


@pytest.mark.parametrize("way", test_program.WAYS, ids="-".join)
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
