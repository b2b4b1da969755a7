"""Walks over the rows of a shard: matrices that alias it, in blocks that fit a CPU's cache or fill a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refit.memory.weights import LocalShard
from refit.plan.box import Box

SAMPLE_STRIDE = 16
"""`--verify sample` compares every 16th row of each shard, another 16th each iteration."""

CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 1 << 18, 1 << 26


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a shard as a matrix: `data` `[rows, columns]`; `row_numbers` `[rows]`, int64; first logical column."""

    row_numbers: torch.Tensor
    first_column: int
    data: torch.Tensor


def rows_of(shard: LocalShard, start: int | None = None) -> Iterator[Rows]:
    """Split a shard into blocks that fit a CPU's cache or fill a GPU. With `start`: every 16th row from there."""
    # Hashing allocates int32 temporaries of a block's size. Small blocks keep them in a core's cache; on a GPU large
    # blocks need fewer launches.
    limit = CPU_BLOCK_ELEMENTS if shard.view.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    for box, matrix in _matrices(shard.box, shard.view):
        numbers = row_numbers(shard.tensor.shape, box, matrix.device)
        if start is not None:
            first = min(start, len(numbers) - 1)
            numbers, matrix = numbers[first::SAMPLE_STRIDE], matrix[first::SAMPLE_STRIDE]
        rows = max(1, limit // max(1, matrix.shape[1]))
        for begin in range(0, len(matrix), rows):
            yield Rows(
                numbers[begin : begin + rows], box.offsets[-1] if box.offsets else 0, matrix[begin : begin + rows]
            )


def _matrices(box: Box, view: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """`view` as matrices `[rows, last dim]` that alias it, each with the box it covers."""
    if view.ndim <= 1:
        yield box, view.reshape(1, -1)
        return
    try:
        yield box, view.view(-1, view.shape[-1])
    except RuntimeError:  # no single matrix has these strides: take the first dim index by index
        for index in range(view.shape[0]):
            part = box.narrow(0, box.offsets[0] + index, box.offsets[0] + index + 1)
            yield from ((part, matrix) for _, matrix in _matrices(part, view[index]))


def row_numbers(shape: tuple[int, ...], box: Box, device: torch.device) -> torch.Tensor:
    """Number of each row of `box` in the global tensor, `[rows]`: row-major over all dims but the last."""
    numbers = torch.zeros(1, dtype=torch.int64, device=device)
    for size, offset, extent in zip(shape[:-1], box.offsets[:-1], box.extents[:-1], strict=True):
        steps = torch.arange(offset, offset + extent, dtype=torch.int64, device=device)
        numbers = (numbers[:, None] * size + steps[None, :]).reshape(-1)
    return numbers
