"""Walks through the codes of a quantised tensor and their scales, in strips of whole rows of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refit.config.quantisation import Quantisation, scale_key
from refit.encodings.fp8.batch import STRIP_ELEMENTS
from refit.memory.rows import GPU_BLOCK_ELEMENTS, SAMPLE_STRIDE, Rows, row_numbers
from refit.memory.views import matrices_of, matrix_of
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.quantised import Grid


@dataclass(frozen=True, slots=True)
class Strip:
    """`box` of a quantised tensor: its codes `[rows, columns]`, and `scale_box` of its scales, one per block."""

    box: Box
    codes: Rows
    scale_box: Box
    scales: torch.Tensor


def strips_of(
    memory: LocalWeights, shard: LocalShard, quantisation: Quantisation, start: int | None = None
) -> Iterator[Strip]:
    """The strips of `shard`, codes in `memory`, which has their scales too. With `start`: every 16th row of blocks."""
    key, shape = shard.tensor.key, shard.tensor.shape
    grid = Grid(shape, quantisation.format)
    limit = STRIP_ELEMENTS if shard.view.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    for part in matrices_of(shard.box):
        for box in _boxes(part, quantisation.format.rows, limit, start):
            (codes,) = memory.views(key, box)
            (scales,) = memory.views(scale_key(key), grid.scales(box))
            rows = Rows(row_numbers(shape, box, codes.data.device), box.offsets[-1], matrix_of(codes.data))
            yield Strip(box, rows, scales.box, matrix_of(scales.data))


def _boxes(matrix: Box, block_rows: int, limit: int, start: int | None) -> list[Box]:
    """Strips of whole rows of blocks, of `limit` elements each, that together are `matrix`. With `start`: every 16th
    row of blocks from there."""
    dim = len(matrix.offsets) - 2
    begin, end = matrix.offsets[dim], matrix.ends[dim]
    if start is None:
        step = height = max(1, limit // matrix.extents[-1] // block_rows) * block_rows
    else:
        step, height = SAMPLE_STRIDE * block_rows, block_rows
        begin += min(start, -(-(end - begin) // block_rows) - 1) * block_rows
    return [matrix.narrow(dim, row, min(row + height, end)) for row in range(begin, end, step)]
