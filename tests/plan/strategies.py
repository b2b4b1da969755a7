"""Strategies for planner tests: random sides as shardings, and a plan carried out on real arrays."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import strategies as st

from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import first_holders
from refit.plan.sharding import RankSharding, ReplicatedShard, Sharding, TensorSpec


def cut(shape: tuple[int, ...], dim: int, parts: int, part: int) -> Box:
    """Part number `part` of `shape` cut into `parts` nearly equal parts along `dim`."""
    size = shape[dim]
    return Box.whole(shape).narrow(dim, size * part // parts, size * (part + 1) // parts)


def side(ranks: range, tensors: dict[TensorSpec, list[list[Box]]]) -> Sharding:
    """`tensors` gives, for each tensor, the boxes of each rank of `ranks`, in order."""
    return Sharding.from_ranks(
        {
            rank: RankSharding.of((spec, box) for spec, boxes in tensors.items() for box in boxes[position])
            for position, rank in enumerate(ranks)
        }
    )


@st.composite
def tensor_on_sides(draw: st.DrawFn, key: str, source: int, destination: int) -> tuple[TensorSpec, list, list]:
    """A tensor, and the boxes each of `source` and `destination` ranks holds of it: cut, replicated, or gated."""
    dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims)))
    spec = TensorSpec(key, shape, draw(st.sampled_from(["bfloat16", "float32"])))
    return spec, draw(boxes_on(shape, source)), draw(boxes_on(shape, destination))


@st.composite
def boxes_on(draw: st.DrawFn, shape: tuple[int, ...], num_ranks: int) -> list[list[Box]]:
    dim = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.integers(1, min(num_ranks, shape[dim])))
    gated = draw(st.booleans()) and shape[dim] >= 2 * parts
    held = []
    for rank in range(num_ranks):
        part = rank % parts
        if gated:
            held.append([cut(shape, dim, 2 * parts, part), cut(shape, dim, 2 * parts, part + parts)])
        else:
            held.append([cut(shape, dim, parts, part)])
    return held


@st.composite
def sides(draw: st.DrawFn, most: int = 6) -> tuple[Sharding, Sharding]:
    """Two sides of one random model, on the same, disjoint or overlapping ranks: at most `most` on each side."""
    num_source, num_destination = draw(st.integers(1, most)), draw(st.integers(1, most))
    first = draw(st.sampled_from([0, num_source, num_source // 2]))
    tensors = [
        draw(tensor_on_sides(f"t{index}", num_source, num_destination)) for index in range(draw(st.integers(1, 4)))
    ]
    return (
        side(range(num_source), {spec: boxes for spec, boxes, _ in tensors}),
        side(range(first, first + num_destination), {spec: boxes for spec, _, boxes in tensors}),
    )


@st.composite
def overlapping_sides(draw: st.DrawFn) -> tuple[Sharding, Sharding]:
    """Like `sides`, but each source rank cuts the tensors in its own way: boxes overlap without being equal."""
    plain, destination = draw(sides())
    by_rank = {rank: plain.of_rank(rank) for rank in plain.ranks}
    for rank in plain.ranks[1:]:
        parts = [(spec, box) for spec in plain.tensors.values() for box in draw(boxes_on(spec.shape, 2))[rank % 2]]
        by_rank[rank] = RankSharding.of(parts)
    # The first rank holds everything, so that nothing is missing.
    whole = RankSharding.of((spec, Box.whole(spec.shape)) for spec in plain.tensors.values())
    return Sharding.from_ranks(by_rank | {plain.ranks[0]: whole}), destination


def staged(source: Sharding, destination: Sharding, num_stages: int, random: Random) -> RefitPlan:
    """A plan of `num_stages`, in which each holder of a box gets it in a stage drawn for it, one at least in the first.

    So some boxes are passed on along a chain, and some ranks both pass on and get.
    """
    drawn: dict[ReplicatedShard, list[int]] = {}

    def until(stage: int, shard: ReplicatedShard) -> list[int]:
        stages = drawn.setdefault(shard, [random.randrange(num_stages) for _ in shard.ranks])
        return [rank for rank, own in zip(shard.ranks, stages, strict=True) if own - min(stages) <= stage]

    via = [
        first_holders(source, destination, lambda shard, stage=stage: until(stage, shard))
        for stage in range(num_stages - 1)
    ]
    return plan_refit(source, destination, via=via)


def carry_out(plan: RefitPlan) -> dict[tuple[str, int], np.ndarray]:
    """(key, destination rank) -> array after the plan: global element numbers, -1 where nothing was written.

    Stages after the first read the arrays, so that what has not been delivered is passed on as -1.
    """
    arrays = {}
    for key, spec in plan.destination_sharding.tensors.items():
        for rank in plan.destination_sharding.ranks:
            arrays[key, rank] = np.full(spec.shape, -1)
    for transfer in plan.transfers():
        numbers = element_numbers(transfer.tensor)
        where = transfer.box.slices_within(Box.whole(transfer.tensor.shape))
        origin = arrays[transfer.tensor.key, transfer.source] if transfer.stage else numbers
        arrays[transfer.tensor.key, transfer.destination][where] = origin[where]
    return arrays


def element_numbers(spec: TensorSpec) -> np.ndarray:
    return np.arange(int(np.prod(spec.shape))).reshape(spec.shape)


def expected(sharding: Sharding) -> dict[tuple[str, int], np.ndarray]:
    """The result that `carry_out` must give: element numbers inside the boxes that a rank holds, -1 elsewhere."""
    arrays = {}
    for key, spec in sharding.tensors.items():
        for rank in sharding.ranks:
            array = np.full(spec.shape, -1)
            for box in sharding.by_key[key].boxes_of(rank):
                where = box.slices_within(Box.whole(spec.shape))
                array[where] = element_numbers(spec)[where]
            arrays[key, rank] = array
    return arrays
