"""Shardings of quantised tensors: every destination block comes once, as codes and scale or unquantised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.quantisation import BLOCK_FORMATS, Place, Quantisation, scale_key
from refit.encodings.fp8.wire import unquantised, wire_shardings
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.planner import plan_refit
from refit.plan.quantised import Grid, quantised_sharding
from refit.plan.sharding import RankSharding, Sharding, TensorSpec

BLOCK = Quantisation("fp8-block", "amax")


def sharded(tensor: TensorSpec, boxes: list[list[Box]], first: int = 0) -> Sharding:
    return Sharding.from_ranks(
        {first + rank: RankSharding.of((tensor, box) for box in held) for rank, held in enumerate(boxes)}
    )


def rows(shape: tuple[int, ...], *cuts: int) -> list[list[Box]]:
    """One rank per stretch of rows between `cuts`."""
    ends = [*cuts, shape[-2]]
    dim = len(shape) - 2
    return [[Box.whole(shape).narrow(dim, a, b)] for a, b in zip([0, *cuts], ends, strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[TensorSpec, Sharding, Sharding, Quantisation]:
    """A source cut anywhere and a destination cut on the grid."""
    name = draw(st.sampled_from(sorted(BLOCK_FORMATS)))
    block = BLOCK_FORMATS[name]
    place = draw(st.sampled_from([Place.AUTO, Place.DESTINATION]))
    blocks = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    ragged = 0 if block.whole else draw(st.sampled_from([0, 1, 64]))
    leading = draw(st.sampled_from([(), (2,)]))
    shape = (*leading, blocks[0] * block.rows + ragged * (block.rows > 1), blocks[1] * block.columns + ragged)
    tensor = TensorSpec("layers.0.weight", shape, "bfloat16", stacked=bool(leading))
    sides = []
    for step in (1, None):
        dim = draw(st.sampled_from([-2, -1])) % len(shape)
        unit = step or (block.rows, block.columns)[dim - len(shape) + 2]
        most = (shape[dim] - 1) // unit
        cuts = sorted(unit * each for each in draw(st.sets(st.integers(1, most), max_size=3))) if most else []
        ends = [*cuts, shape[dim]]
        sides.append([[Box.whole(shape).narrow(dim, a, b)] for a, b in zip([0, *cuts], ends, strict=True)])
    source, destination = sharded(tensor, sides[0]), sharded(tensor, sides[1], first=len(sides[0]))
    return tensor, source, destination, Quantisation(name, next(iter(block.rules)), place=place)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_block_comes_once(case: tuple[TensorSpec, Sharding, Sharding, Quantisation]) -> None:
    tensor, source, destination, quantisation = case
    grid = Grid(tensor.shape, quantisation.format)
    held = quantised_sharding(destination, quantisation)
    wire = wire_shardings(source, held, quantisation)
    plan_refit(wire.source, wire.destination)  # which proves that each element is written once from a holder
    for rank in destination.ranks:
        shards = wire.destination.of_rank(rank).shards
        codes = shards[tensor.key].boxes if tensor.key in shards else ()
        scales = shards[scale_key(tensor.key)].boxes if tensor.key in shards else ()
        rest = shards[unquantised(tensor).key].boxes if unquantised(tensor).key in shards else ()
        assert coalesce((*codes, *rest)) == coalesce(destination.of_rank(rank).shards[tensor.key].boxes)
        assert coalesce(grid.scales(box) for box in codes) == coalesce(scales)
        assert all(grid.is_aligned(box) for box in (*codes, *rest))
    blocks = sum(
        grid.num_blocks(shard.boxes) for r in destination.ranks for shard in [destination.of_rank(r).shards[tensor.key]]
    )
    assert wire.num_at_source + wire.num_at_destination == blocks
    assert bool(wire.reasons) == bool(wire.num_at_destination)
    aligned = all(grid.is_aligned(shard.box) for shard in source.by_key[tensor.key].shards)
    if quantisation.place is Place.DESTINATION:
        assert wire.num_at_source == 0
    elif aligned:
        assert wire.num_at_destination == 0


def test_blocks_cut_at_the_source_are_quantised_at_the_destination() -> None:
    """192-row shards: of three blocks of 128 rows the middle one is cut."""
    tensor = TensorSpec("w.weight", (384, 256), "bfloat16")
    source, destination = sharded(tensor, rows(tensor.shape, 192)), sharded(tensor, rows(tensor.shape), first=2)
    held = quantised_sharding(destination, BLOCK)
    wire = wire_shardings(source, held, BLOCK)
    assert (wire.num_at_source, wire.num_at_destination) == (4, 2)
    assert wire.reasons == {"w.weight": "192-row shards of 128-row blocks"}
    assert held.bytes_per_rank == {2: 384 * 256 + 4 * 3 * 2}
    with pytest.raises(UsageError, match=r"--quantise source: w\.weight .*192-row shards of 128-row blocks"):
        wire_shardings(source, held, Quantisation("fp8-block", "amax", place=Place.SOURCE))


def test_quantising_reads_weights_and_no_scales() -> None:
    """Of 256 x 256 weights at two ranks: 256 x 256 codes and 4 scales of 4 bytes for each of two destinations."""
    tensor = TensorSpec("w.weight", (256, 256), "bfloat16")
    source, whole = sharded(tensor, rows(tensor.shape, 128)), sharded(tensor, rows(tensor.shape) * 2, first=1)
    wire = wire_shardings(source, quantised_sharding(whole, BLOCK), BLOCK)
    plan = plan_refit(wire.source, wire.destination)
    half = 128 * 256
    # Rank 0 makes its half once for both destinations. Its copies would read two scales for each.
    assert dict(wire.work_bytes(plan)) == {0: half - 2 * 2 * 4, 1: half - 2 * 2 * 4}


def test_what_is_quantised_where_it_arrives_is_read_and_written_again() -> None:
    tensor = TensorSpec("w.weight", (256, 256), "bfloat16")
    rule = Quantisation("fp8-block", "amax", place=Place.DESTINATION)
    side = sharded(tensor, rows(tensor.shape))
    wire = wire_shardings(side, quantised_sharding(side, rule), rule)
    assert dict(wire.work_bytes(plan_refit(wire.source, wire.destination))) == {0: 256 * 256 * 3}


@pytest.mark.parametrize(
    ("shape", "cuts", "name", "message"),
    [
        ((256, 256), (64,), "fp8-block", "rank 0 holds 64 rows of a.weight from 0 on.* blocks of 128"),
        ((256, 100), (), "mxfp8", "100 columns of a.weight cannot be divided into blocks of 32"),
    ],
)
def test_destinations_that_cut_blocks_are_refused(
    shape: tuple[int, ...], cuts: tuple[int, ...], name: str, message: str
) -> None:
    tensor = TensorSpec("a.weight", shape, "bfloat16")
    quantisation = Quantisation(name, next(iter(BLOCK_FORMATS[name].rules)))
    with pytest.raises(UsageError, match=message) as error:
        quantised_sharding(sharded(tensor, rows(shape, *cuts)), quantisation)
    assert "\n" not in str(error.value)


def test_a_last_block_may_be_smaller() -> None:
    """The 576 rows of DeepSeek-V3's kv_a_proj_with_mqa have 5 rows of scales in its checkpoint, 7168 columns 56."""
    tensor = TensorSpec("linear_kv_down_proj.weight", (576, 7168), "bfloat16")
    held = quantised_sharding(sharded(tensor, rows(tensor.shape)), BLOCK)
    assert held.tensors[scale_key(tensor.key)].shape == (5, 56)


def test_a_rule_of_another_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="--fp8-scale-rule ceil is a rule of mxfp8: fp8-block has amax, amax-inverse"):
        Quantisation("fp8-block", "ceil")
