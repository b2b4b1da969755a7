"""The oracle's part of an encoding: what a source is filled with, and what a destination must hold after a refit.

Parts wrap one another as encodings follow one another, around `PlainPart`, that of weights which are sent as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from refit.encodings.values import hashed
from refit.memory.rows import Rows, rows_of
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.sharding import TensorSpec

Values = Callable[[TensorSpec, Rows], torch.Tensor]
"""The source's values `[rows, columns]` of rows of a tensor, in the dtype of the tensor."""

Index = Callable[[int, int], tuple[int, ...]]
"""The logical index in the whole tensor of a row and a column."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a destination should hold and what it holds, `[rows, columns]` each: `found` is the memory itself."""

    key: str
    expected: torch.Tensor
    found: torch.Tensor
    index: Index


class OraclePart(Protocol):
    """What one encoding asks of the oracle. Every value is a function of its place and the iteration.

    So any shard can be filled or checked without the rest of its tensor and without the state before, on any device.
    `keeps_base`: a refit changes only a part of what the destination holds, so that is poisoned before the first alone.
    `is_real`: the innermost values are those of real weights, so no part makes up others for tests of its own.
    """

    @property
    def keeps_base(self) -> bool: ...

    @property
    def is_real(self) -> bool: ...

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        """The source's values `[rows, columns]`, in the dtype of `tensor`.

        They may follow from those of the part inside, for this iteration and for those before.
        """
        ...

    def comparisons(
        self,
        values: Values,
        held: LocalWeights,
        shard: LocalShard,
        source: Mapping[str, TensorSpec],
        start: int | None = None,
    ) -> Iterator[Comparison]:
        """What `shard` of the destination `held` must be where the source has `values`, block by block.

        `source` has the source's tensors by key. With `start`: every 16th row from there.
        """
        ...


class PlainPart:
    """Weights that are sent as they are, or cast to the destination's dtype."""

    keeps_base = False
    is_real = False

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        return hashed(tensor, block, iteration)

    def comparisons(
        self,
        values: Values,
        held: LocalWeights,
        shard: LocalShard,
        source: Mapping[str, TensorSpec],
        start: int | None = None,
    ) -> Iterator[Comparison]:
        """Beyond the first dim of the source's tensor is padding, which must be zero."""
        tensor, shape = source[shard.tensor.key], shard.tensor.shape
        for block in rows_of(shard, start):
            expected = values(tensor, block).to(block.data.dtype)
            if tensor.shape[0] < shard.box.ends[0]:
                expected[block.row_numbers >= tensor.shape[0] * _rows_per_leading_index(shape)] = 0
            yield Comparison(tensor.key, expected, block.data, _index_in(block, shape))


PLAIN = PlainPart()


class WrappedPart:
    """A part around `inner`, which has what the part does not say itself."""

    def __init__(self, inner: OraclePart) -> None:
        self.inner = inner

    @property
    def keeps_base(self) -> bool:
        return self.inner.keeps_base

    @property
    def is_real(self) -> bool:
        return self.inner.is_real

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        return self.inner.values(tensor, block, iteration)

    def comparisons(
        self,
        values: Values,
        held: LocalWeights,
        shard: LocalShard,
        source: Mapping[str, TensorSpec],
        start: int | None = None,
    ) -> Iterator[Comparison]:
        return self.inner.comparisons(values, held, shard, source, start)


def _index_in(block: Rows, shape: tuple[int, ...]) -> Index:
    """For rows of a tensor of `shape`."""

    def index(row: int, column: int) -> tuple[int, ...]:
        number, leading = int(block.row_numbers[row]), shape[:-1]
        found = [block.first_column + column]
        for size in reversed(leading[1:]):
            number, last = divmod(number, size)
            found.insert(0, last)
        return (number, *found) if leading else tuple(found)

    return index


def _rows_per_leading_index(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[1:-1]:
        rows *= size
    return rows
