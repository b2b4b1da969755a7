"""Gives a source the values that its weights have once they were moved: rounded, or quantised and multiplied again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from refit.bench.session import Session
from refit.bench.sides import Side
from refit.config.quantisation import Quantisation
from refit.encodings.fp8.reference import dequantise, largest_bits, quantise_by
from refit.memory.views import matrices_of, matrix_of, part_within
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.quantised import Grid
from refit.plan.sharding import TensorSpec


@contextmanager
def as_moved(session: Session, source: Side, destination: Side) -> Iterator[None]:
    """Within this context the source's weights have the values that `destination` computes with, in their own dtype.

    What changes is kept in the host's memory and written back. Collective: every rank of the job.
    """
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []
    weights, held = source.weights or LocalWeights(()), destination.sharding.tensors
    quantisation = destination.spec.quantisation
    with torch.no_grad():
        if quantisation is not None:
            tensors = [
                tensor for key, tensor in source.sharding.tensors.items() if quantisation.quantises(key, tensor.shape)
            ]
            largest = _largest_bits(session, weights, tensors, quantisation)
        for shard in weights:
            key, view = shard.tensor.key, shard.view.detach()
            if quantisation is not None and quantisation.quantises(key, shard.tensor.shape):
                changed.append((view, view.to("cpu", copy=True)))
                _quantise(shard, largest[key].to(view.device), quantisation)
            elif key in held and held[key].dtype != shard.tensor.dtype:
                changed.append((view, view.to("cpu", copy=True)))
                view.copy_(view.to(getattr(torch, held[key].dtype)))
    try:
        yield
    finally:
        with torch.no_grad():
            for view, before in changed:
                view.copy_(before)


def _largest_bits(
    session: Session, weights: LocalWeights, tensors: list[TensorSpec], quantisation: Quantisation
) -> dict[str, torch.Tensor]:
    """The bits of the largest magnitude of every block of `tensors`, int16, each of the shape of its scales.

    A rank may hold part of a block: the larger bits of all ranks count. Collective: every rank of the job.
    """
    grids = {tensor.key: Grid(tensor.shape, quantisation.format) for tensor in tensors}
    found = {key: torch.zeros(grid.scale_shape, dtype=torch.int32) for key, grid in grids.items()}
    for shard in weights:
        key = shard.tensor.key
        if key in grids:
            for _, whole, matrix in _in_whole_blocks(shard, grids[key]):
                largest = largest_bits(matrix, quantisation.format).int().cpu()
                place = found[key][_slices(grids[key].scales(whole))]
                torch.maximum(place, largest.view(place.shape), out=place)
    for largest in found.values():
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=session.control)
    return {key: largest.to(torch.int16) for key, largest in found.items()}


def _quantise(shard: LocalShard, largest: torch.Tensor, quantisation: Quantisation) -> None:
    """Replace the shard's values by codes x scales, rounded to its dtype."""
    grid = Grid(shard.tensor.shape, quantisation.format)
    for part, whole, matrix in _in_whole_blocks(shard, grid):
        made = quantise_by(matrix_of(largest[_slices(grid.scales(whole))]), matrix, quantisation)
        values = dequantise(made.codes, made.scales, quantisation.format).view(whole.extents)
        part_within(shard.view.detach(), shard.box, part).copy_(part_within(values, whole, part))


def _in_whole_blocks(shard: LocalShard, grid: Grid) -> Iterator[tuple[Box, Box, torch.Tensor]]:
    """Matrix by matrix of the shard: its box, that of the whole blocks around it, and the values of these
    `[rows, columns]`, zeros where the shard has none."""
    for part in matrices_of(shard.box):
        whole, values = grid.hull(part), part_within(shard.view.detach(), shard.box, part)
        if whole != part:
            padded = values.new_zeros(whole.extents)
            part_within(padded, whole, part).copy_(values)
            values = padded
        yield part, whole, matrix_of(values)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in zip(box.offsets, box.ends, strict=True))
