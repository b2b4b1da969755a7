"""Shardings as meshes: what is expressed reconstructs every rank's boxes, and what is refused no mesh can describe."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.config.side import SideSpec
from refit.plan.box import Box
from refit.plan.meshes import Mesh, MeshLimits, MeshRefit, Reshard, mesh_of, mesh_refit
from refit.plan.sharding import RankSharding, Sharding, TensorSpec
from refit.predict.megatron import predict
from tests.models.megatron.small import MOE
from tests.plan.strategies import boxes_on, side

LIMITS = MeshLimits(
    frozenset({"bfloat16", "float32"}), max_dims=3, max_fan_in=16, max_fan_out=64, max_local_bytes=1 << 32
)


def all_meshes(first: int, num_ranks: int, num_dims: int) -> list[Mesh]:
    """Every mesh of these ranks."""
    shapes = [(rows, num_ranks // rows) for rows in range(1, num_ranks + 1) if num_ranks % rows == 0]
    return [Mesh(first, dims, axis, dim) for dims in shapes for axis in (0, 1) for dim in range(num_dims)]


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Mesh, Box]:
    """A mesh and a region that its shards divide."""
    num_dims = draw(st.integers(1, 3))
    mesh = Mesh(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        draw(st.integers(0, 1)),
        draw(st.integers(0, num_dims - 1)),
    )
    extents = [draw(st.integers(1, 4)) for _ in range(num_dims)]
    extents[mesh.dim] *= mesh.num_shards
    return mesh, Box(tuple(draw(st.integers(0, 5)) for _ in extents), tuple(extents))


@given(meshes())
def test_the_mesh_of_its_own_boxes_is_found(drawn: tuple[Mesh, Box]) -> None:
    mesh, region = drawn
    found = mesh_of(mesh.boxes(region), region)
    assert found is not None
    assert found.boxes(region) == mesh.boxes(region)


@given(st.data())
def test_what_has_no_mesh_is_described_by_none(data: st.DataObject) -> None:
    """`mesh_of` finds a mesh exactly where one of all meshes of these ranks gives these boxes."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    region, num_ranks = Box.whole(shape), data.draw(st.integers(1, 6))
    cuts = [
        region.narrow(dim, begin, end)
        for dim in range(len(shape))
        for begin, end in itertools.combinations(range(shape[dim] + 1), 2)
    ]
    held = {2 + rank: data.draw(st.sampled_from(cuts)) for rank in range(num_ranks)}
    possible = [
        mesh
        for mesh in all_meshes(2, num_ranks, len(shape))
        if shape[mesh.dim] % mesh.num_shards == 0 and mesh.boxes(region) == held
    ]
    found = mesh_of(held, region)
    assert (found is not None) == bool(possible)
    assert found is None or found in possible or found.boxes(region) == held


def carried_out(refit: MeshRefit, source: Sharding, destination: Sharding) -> None:
    """Carry each reshard out on arrays as a mesh library would, from its two meshes alone; compare every element."""
    for key, reshards in refit.reshards.items():
        shape = destination.tensors[key].shape
        values = np.arange(1, 1 + np.prod(shape)).reshape(shape)
        found = {rank: np.zeros(shape, np.int64) for rank in destination.ranks}
        for each in reshards:
            assert set(each.source.ranks).isdisjoint(each.destination.ranks)
            sent = np.zeros(shape, np.int64)
            for rank, box in each.source.boxes(each.region).items():
                assert any(held.contains(box) for held in source.by_key[key].boxes_of(rank))
                sent[box.slices_within(Box.whole(shape))] = values[box.slices_within(Box.whole(shape))]
            for rank, box in each.destination.boxes(each.region).items():
                assert any(held.contains(box) for held in destination.by_key[key].boxes_of(rank))
                part = box.slices_within(Box.whole(shape))
                assert not found[rank][part].any(), "written twice"
                found[rank][part] = sent[part]
        for rank in destination.ranks:
            wanted = np.zeros(shape, np.int64)
            for box in destination.by_key[key].boxes_of(rank):
                wanted[box.slices_within(Box.whole(shape))] = values[box.slices_within(Box.whole(shape))]
            np.testing.assert_array_equal(found[rank], wanted)


@st.composite
def disjoint_sides(draw: st.DrawFn) -> tuple[Sharding, Sharding]:
    """Two sides of one random model on disjoint ranks."""
    num_source, num_destination = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    both: list[dict[TensorSpec, list[list[Box]]]] = [{}, {}]
    for index in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        spec = TensorSpec(f"t{index}", shape, "bfloat16", stacked=len(shape) > 1 and draw(st.booleans()))
        both[0][spec] = draw(boxes_on(shape, num_source))
        both[1][spec] = draw(boxes_on(shape, num_destination))
    first = draw(st.sampled_from([0, 2]))
    return side(range(first, first + num_source), both[0]), side(
        range(first + num_source, first + num_source + num_destination), both[1]
    )


@given(disjoint_sides())
def test_every_tensor_is_refitted_in_full_or_refused_with_a_reason(sides: tuple[Sharding, Sharding]) -> None:
    refit = mesh_refit(*sides, LIMITS)
    assert set(refit.reshards) | set(refit.not_expressible) == set(sides[1].tensors)
    assert set(refit.reshards).isdisjoint(refit.not_expressible)
    assert all(refit.reshards.values())
    assert all(refit.not_expressible.values())
    carried_out(refit, *sides)


def sizes(tp: int, ep: int, etp: int, pp: int = 1) -> dict[str, int]:
    return {"tp": tp, "ep": ep, "etp": etp, "pp": pp}


def megatron(world_size: int, first: int, **parallel: int) -> Sharding:
    return predict(MOE, SideSpec(Layout(**parallel, world_size=world_size, first_rank=first)))


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ((2, sizes(1, 2, 1)), (2, sizes(1, 2, 1))),
        ((2, sizes(2, 1, 2)), (2, sizes(1, 2, 1))),
        ((2, sizes(2, 1, 1)), (1, sizes(1, 1, 1))),
        ((4, sizes(2, 2, 2)), (2, sizes(2, 1, 2))),
        ((4, sizes(2, 2, 1)), (4, sizes(1, 4, 1))),
        ((4, sizes(2, 1, 1, 2)), (2, sizes(2, 2, 1))),
        ((4, sizes(1, 2, 1)), (4, sizes(4, 2, 2))),
    ],
    ids=str,
)
def test_a_model_of_experts_is_expressed_whole(
    source: tuple[int, dict[str, int]], destination: tuple[int, dict[str, int]]
) -> None:
    sides = megatron(source[0], 0, **source[1]), megatron(destination[0], source[0], **destination[1])
    refit = mesh_refit(*sides, LIMITS)
    assert refit.not_expressible == {}
    carried_out(refit, *sides)


def test_gate_and_up_are_reshards_of_their_own_where_a_side_shards_them_apart() -> None:
    fc1 = TensorSpec("experts.linear_fc1.weight", (2, 8, 3), "bfloat16", stacked=True)
    halves = [[Box((0, 4 * part + 2 * rank, 0), (2, 2, 3)) for part in (0, 1)] for rank in (0, 1)]
    sides = side(range(2), {fc1: halves}), side(range(2, 4), {fc1: [[Box((e, 0, 0), (1, 8, 3))] for e in (0, 1)]})
    both = Mesh(0, (1, 2), 1, 1)
    assert mesh_refit(*sides, LIMITS).reshards[fc1.key] == tuple(
        Reshard(Box((expert, row, 0), (1, 4, 3)), both, Mesh(2 + expert, (1, 1), 1, 0))
        for expert in (0, 1)
        for row in (0, 4)
    )


def test_replicas_apart_take_turns_and_receive_a_reshard_each() -> None:
    weight = TensorSpec("w", (2, 2), "bfloat16", stacked=True)
    rows = [[Box((rank % 2, 0), (1, 2))] for rank in range(4)]
    found = mesh_refit(side(range(4), {weight: rows}), side(range(4, 8), {weight: rows}), LIMITS).reshards["w"]
    assert [(each.source.first_rank, each.destination.first_rank) for each in found] == [(0, 4), (2, 6), (3, 5), (1, 7)]


def two_sides(shape: tuple[int, ...], source: int, destination: int, **spec: object) -> tuple[Sharding, Sharding]:
    """A tensor cut along dim 0 by `source` ranks, and along its last dim by `destination` ranks."""
    tensor = replace(TensorSpec("w", shape, "bfloat16"), **spec)  # type: ignore[arg-type]

    def cut(parts: int, dim: int, first: int) -> Sharding:
        size = shape[dim] // parts
        boxes = [[Box.whole(shape).narrow(dim, part * size, (part + 1) * size)] for part in range(parts)]
        return side(range(first, first + parts), {tensor: boxes})

    return cut(source, 0, 0), cut(destination, len(shape) - 1, source)


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        (two_sides((4, 4), 2, 2, dtype="int16"), "its dtype is int16"),
        (two_sides((2, 2, 2, 2), 2, 2), "it has 4 dims"),
        (two_sides((32, 32), 32, 1), "32 source shards overlap a destination shard, 16 at most are possible"),
        (two_sides((4, 128), 1, 128), "128 destination shards overlap a source shard, 64 at most are possible"),
        (
            two_sides((1 << 16, 1 << 16), 1, 1),
            f"{1 << 33:,} bytes of it are on one rank, {1 << 32:,} at most are possible",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_library_s_limits_are_reasons(sides: tuple[Sharding, Sharding], reason: str) -> None:
    assert mesh_refit(*sides, LIMITS).not_expressible == {"w": reason}


def test_uneven_parts_shared_ranks_casts_and_padding_are_reasons() -> None:
    even, uneven = [[Box((0,), (2,))], [Box((2,), (2,))]], [[Box((0,), (1,))], [Box((1,), (3,))]]

    def reason(source: Sharding, destination: Sharding) -> str:
        return mesh_refit(source, destination, LIMITS).not_expressible["w"]

    def of(ranks: range, boxes: list[list[Box]], size: int = 4, dtype: str = "bfloat16") -> Sharding:
        return side(ranks, {TensorSpec("w", (size,), dtype, padded=True): boxes})

    assert reason(of(range(2), uneven), of(range(2, 4), even)) == "no mesh of contiguous ranks describes it"
    assert reason(of(range(2), even), of(range(1, 3), even)) == "both sides share ranks"
    assert reason(of(range(2), even, dtype="float32"), of(range(2, 4), even)) == "the dtype changes"
    padded = [[Box((0,), (5,))]]
    assert reason(of(range(2), even), of(range(2, 3), padded, 5)) == "the sides pad it to different shapes"


def test_a_side_of_one_rank_holds_the_tensor_whole() -> None:
    spec = TensorSpec("w", (3,), "float32")
    sides = [Sharding.from_ranks({rank: RankSharding.of([(spec, Box.whole((3,)))])}) for rank in (0, 1)]
    whole = Mesh(0, (1, 1), 1, 0)
    assert mesh_refit(*sides, LIMITS).reshards["w"] == (Reshard(Box.whole((3,)), whole, replace(whole, first_rank=1)),)
