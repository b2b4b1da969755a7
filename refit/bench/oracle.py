"""The oracle: fills weights with values that encode their position, and compares what arrived bit for bit.

The value at logical index `[..., row, column]` of a tensor is a hash of the tensor's key, the row's number, the column
and the iteration, so any shard can be filled or checked without building the whole tensor, on any device. Values are
finite (2**-7 <= |value| < 2), so that a filled model can also run a forward pass. They carry 11 (bfloat16), 14
(float16) or 27 bits (float32) of the hash: an element that came from a wrong place or iteration is found with
probability 1 - 2**-11 or better, so counts of misplaced elements are low by at most 0.05 %. Poison is never a value, so
an element that was not written is always found.

Of a quantised tensor every code and every scale is compared with those that the named rule gives, in plain torch, for
the source's values of the whole block. Such values differ in magnitude from block to block (`values`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from refit.config.quantisation import Quantisation, scale_key
from refit.encodings.fp8.reference import quantise
from refit.encodings.fp8.strips import strips_of
from refit.encodings.values import values
from refit.memory.rows import SAMPLE_STRIDE, Rows, rows_of
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One wrong element: its logical index in the global tensor, the expected value and the value found."""

    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True, slots=True)
class WrongTensor:
    """The number of wrong elements of one tensor on one rank, and the first of them."""

    key: str
    num_wrong: int
    first: Mismatch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rank found in its destination weights."""

    num_compared: int
    wrong: tuple[WrongTensor, ...]

    @property
    def num_wrong(self) -> int:
        return sum(tensor.num_wrong for tensor in self.wrong)


@dataclass(slots=True)
class _Tally:
    """Collects the differences of one destination."""

    num_compared: int = 0
    wrong: dict[str, WrongTensor] = field(default_factory=dict)

    def add(
        self, key: str, expected: torch.Tensor, found: torch.Tensor, index: Callable[[int, int], tuple[int, ...]]
    ) -> None:
        """Compare `[rows, columns]` as bits. `index` gives the logical index of a place in them."""
        bits = _BITS[found.element_size()]
        differs = found.view(bits) != expected.view(bits)
        self.num_compared += differs.numel()
        num_wrong = int(differs.sum())
        if num_wrong:
            before = self.wrong.get(key)
            first = before.first if before else _first(expected, found, differs, index)
            self.wrong[key] = WrongTensor(key, num_wrong + (before.num_wrong if before else 0), first)

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.num_compared, tuple(self.wrong.values()))


def fill(memory: LocalWeights, iteration: int, quantisation: Quantisation | None = None) -> None:
    """Write the values of `iteration` to every element of a source that is refitted to `quantisation`."""
    for shard in memory:
        for block in rows_of(shard):
            block.data.copy_(values(shard.tensor, block, iteration, quantisation))


def poison(memory: LocalWeights) -> None:
    """Overwrite every element of a destination with all-ones bits (NaN), which no value has."""
    for shard in memory:
        shard.view.view(_BITS[shard.view.element_size()]).fill_(255 if shard.view.element_size() == 1 else -1)


def check(
    memory: Iterable[LocalShard],
    source: Mapping[str, TensorSpec],
    iteration: int,
    *,
    sample: bool = False,
    quantisation: Quantisation | None = None,
) -> Verdict:
    """Compare shards of a destination, as bits, with the source's values of `iteration`.

    `source` has each tensor's dtype and first dim at the source. Expected values are cast from that dtype to the
    destination's, or quantised by `quantisation`. Beyond that first dim is padding, which must be zero. `sample`
    compares every 16th row only, of quantised tensors every 16th row of blocks.
    """
    tally = _Tally()
    held = LocalWeights(memory)
    scales = {scale_key(key) for key in source}
    start = iteration % SAMPLE_STRIDE if sample else None
    for shard in held:
        key = shard.tensor.key
        if quantisation is not None and quantisation.quantises(key, shard.tensor.shape):
            _check_codes(tally, held, shard, source[key], iteration, start, quantisation)
        elif key not in scales:
            for block in rows_of(shard, start):
                expected = _expected(source[key], shard, block, iteration)
                tally.add(key, expected, block.data, _index_in(block, shard.tensor.shape))
    return tally.verdict


def _expected(source: TensorSpec, shard: LocalShard, block: Rows, iteration: int) -> torch.Tensor:
    expected = values(source, block, iteration).to(block.data.dtype)
    if source.shape[0] < shard.box.ends[0]:
        rows_per_index = _rows_per_leading_index(shard.tensor.shape)
        expected[block.row_numbers >= source.shape[0] * rows_per_index] = 0
    return expected


def _check_codes(
    tally: _Tally,
    memory: LocalWeights,
    shard: LocalShard,
    source: TensorSpec,
    iteration: int,
    start: int | None,
    quantisation: Quantisation,
) -> None:
    """Compare the codes of `shard` and their scales, strip by strip of whole blocks."""
    for strip in strips_of(memory, shard, quantisation, start):
        expected = quantise(values(source, strip.codes, iteration, quantisation), quantisation)
        tally.add(source.key, expected.codes, strip.codes.data, _index_from(strip.box))
        tally.add(scale_key(source.key), expected.scales, strip.scales, _index_from(strip.scale_box))


def _first(
    expected: torch.Tensor, found: torch.Tensor, differs: torch.Tensor, index: Callable[[int, int], tuple[int, ...]]
) -> Mismatch:
    row, column = (int(i) for i in differs.nonzero()[0])
    return Mismatch(index(row, column), float(expected[row, column]), float(found[row, column]))


def _index_from(box: Box) -> Callable[[int, int], tuple[int, ...]]:
    """For a matrix that is `box`."""
    return lambda row, column: (*box.offsets[:-2], box.offsets[-2] + row, box.offsets[-1] + column)


def _index_in(block: Rows, shape: tuple[int, ...]) -> Callable[[int, int], tuple[int, ...]]:
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
