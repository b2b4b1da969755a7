"""The oracle: fills weights with values that encode their position, and compares what arrived bit for bit.

The value at logical index `[..., row, column]` of a tensor is a hash of the tensor's key, the row's number, the column
and the iteration, so any shard can be filled or checked without building the whole tensor, on any device. Values are
finite (2**-7 <= |value| < 2), so that a filled model can also run a forward pass. They carry 11 (bfloat16), 14
(float16) or 27 bits (float32) of the hash: an element that came from a wrong place or iteration is found with
probability 1 - 2**-11 or better, so counts of misplaced elements are low by at most 0.05 %. Poison is never a value, so
an element that was not written is always found.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from refit.models.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

# (integer view, hash bits kept, bits set) per float dtype: sign, mantissa and the low three exponent bits vary.
_PATTERNS = {
    torch.bfloat16: (torch.int16, 0x83FF, 0x3C00),
    torch.float16: (torch.int16, 0x9FFF, 0x2000),
    torch.float32: (torch.int32, 0x83FFFFFF, 0x3C000000),
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE_STRIDE = 16
"""`--verify sample` compares every 16th row of each shard, another 16th each iteration."""


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


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a shard as a matrix: `data` `[rows, columns]`; `row_numbers` `[rows]`, int64; first logical column."""

    row_numbers: torch.Tensor
    first_column: int
    data: torch.Tensor


def fill(memory: LocalWeights, iteration: int) -> None:
    """Write the values of `iteration` to every element of a source."""
    for shard in memory:
        for block in _blocks(shard):
            block.data.copy_(_values(shard.tensor, block, iteration))


def spread(memory: LocalWeights) -> Iterator[tuple[LocalShard, torch.Tensor, torch.Tensor]]:
    """For every block of every shard: the shard, the block `[rows, columns]`, and values of iteration 0 for it.

    The values are float32, whatever the tensor's dtype, so they are the same at every side.
    """
    for shard in memory:
        for block in _blocks(shard):
            yield shard, block.data, _values(replace(shard.tensor, dtype="float32"), block, 0)


def poison(memory: LocalWeights) -> None:
    """Overwrite every element of a destination with all-ones bits (NaN), which no value has."""
    for shard in memory:
        shard.view.view(_BITS[shard.view.element_size()]).fill_(255 if shard.view.element_size() == 1 else -1)


def check(
    memory: Iterable[LocalShard], source: Mapping[str, TensorSpec], iteration: int, *, sample: bool = False
) -> Verdict:
    """Compare shards of a destination, as bits, with the source's values of `iteration`.

    `source` has each tensor's dtype and first dim at the source. Expected values are cast from that dtype to the
    destination's. Beyond that first dim is padding, which must be zero. `sample` compares every 16th row only.
    """
    compared = 0
    wrong: dict[str, WrongTensor] = {}
    for shard in memory:
        for block in _blocks(shard, start=iteration % SAMPLE_STRIDE if sample else None):
            expected = _expected(source[shard.tensor.key], shard, block, iteration)
            bits = _BITS[block.data.element_size()]
            differs = block.data.view(bits) != expected.view(bits)
            compared += differs.numel()
            num_wrong = int(differs.sum())
            if num_wrong:
                before = wrong.get(shard.tensor.key)
                first = before.first if before else _first(shard, block, expected, differs)
                total = num_wrong + (before.num_wrong if before else 0)
                wrong[shard.tensor.key] = WrongTensor(shard.tensor.key, total, first)
    return Verdict(compared, tuple(wrong.values()))


def _expected(source: TensorSpec, shard: LocalShard, block: _Block, iteration: int) -> torch.Tensor:
    values = _values(source, block, iteration).to(block.data.dtype)
    if source.shape[0] < shard.box.ends[0]:
        rows_per_index = _rows_per_leading_index(shard.tensor.shape)
        values[block.row_numbers >= source.shape[0] * rows_per_index] = 0
    return values


def _first(shard: LocalShard, block: _Block, expected: torch.Tensor, differs: torch.Tensor) -> Mismatch:
    row, column = (int(i) for i in differs.nonzero()[0])
    number, leading = int(block.row_numbers[row]), shard.tensor.shape[:-1]
    index = [block.first_column + column]
    for size in reversed(leading[1:]):
        number, last = divmod(number, size)
        index.insert(0, last)
    if leading:
        index.insert(0, number)
    return Mismatch(tuple(index), float(expected[row, column]), float(block.data[row, column]))


def _rows_per_leading_index(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[1:-1]:
        rows *= size
    return rows


def _blocks(shard: LocalShard, start: int | None = None) -> Iterator[_Block]:
    """Split a shard into blocks that fit a CPU's cache or fill a GPU. With `start`: every 16th row from there."""
    # Hashing allocates int32 temporaries of a block's size. Small blocks keep them in a core's cache; on a GPU large
    # blocks need fewer launches.
    limit = 1 << 18 if shard.view.device.type == "cpu" else 1 << 26
    for box, matrix in _matrices(shard.box, shard.view):
        numbers = _row_numbers(shard.tensor.shape, box, matrix.device)
        if start is not None:
            first = min(start, len(numbers) - 1)
            numbers, matrix = numbers[first::SAMPLE_STRIDE], matrix[first::SAMPLE_STRIDE]
        rows = max(1, limit // max(1, matrix.shape[1]))
        for begin in range(0, len(matrix), rows):
            yield _Block(
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


def _row_numbers(shape: tuple[int, ...], box: Box, device: torch.device) -> torch.Tensor:
    """Number of each row of `box` in the global tensor, `[rows]`: row-major over all dims but the last."""
    numbers = torch.zeros(1, dtype=torch.int64, device=device)
    for size, offset, extent in zip(shape[:-1], box.offsets[:-1], box.extents[:-1], strict=True):
        steps = torch.arange(offset, offset + extent, dtype=torch.int64, device=device)
        numbers = (numbers[:, None] * size + steps[None, :]).reshape(-1)
    return numbers


def _values(tensor: TensorSpec, block: _Block, iteration: int) -> torch.Tensor:
    """Values of a block `[rows, columns]`, in the dtype of `tensor`."""
    bits = _hash(_seed(tensor.key, iteration), block)
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if dtype in _PATTERNS:
        view, keep, fixed = _PATTERNS[dtype]
        if view is torch.int16:
            bits = bits.bitwise_right_shift_(16).to(torch.int16)
        return bits.bitwise_and_(_signed(keep, view)).bitwise_or_(fixed).view(dtype)
    if dtype is torch.bool:
        return bits < 0
    return bits.to(dtype)  # integers, and float64 with whole values


def _signed(pattern: int, dtype: torch.dtype) -> int:
    width = torch.iinfo(dtype).bits
    return pattern - (1 << width) if pattern >> (width - 1) else pattern


def _seed(key: str, iteration: int) -> int:
    return zlib.crc32(key.encode()) * 0x1_0000_0001 + iteration * 0x5851F42D4C957F2D


def _hash(seed: int, block: _Block) -> torch.Tensor:
    """32 hash bits per element `[rows, columns]`, int32.

    Rows are seeded with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), columns mixed in with multiply and
    xor-shift (the finaliser of MurmurHash3); int64 and int32 arithmetic wraps in torch as it does in C.
    """
    row = block.row_numbers * _signed(0x9E3779B97F4A7C15, torch.int64) + _signed(seed & (2**64 - 1), torch.int64)
    row = (row ^ ((row >> 30) & 0x3_FFFF_FFFF)) * _signed(0xBF58476D1CE4E5B9, torch.int64)
    row = (row ^ ((row >> 27) & 0x1F_FFFF_FFFF)) * _signed(0x94D049BB133111EB, torch.int64)
    row_seeds = (row >> 32).to(torch.int32)
    columns = torch.arange(block.data.shape[1], dtype=torch.int64, device=row.device) + block.first_column
    column_seeds = (columns * 0x9E3779B1).bitwise_and_(0xFFFFFFFF)
    column_seeds = torch.where(column_seeds >= 2**31, column_seeds - 2**32, column_seeds).to(torch.int32)
    bits = row_seeds[:, None] + column_seeds[None, :]
    bits.mul_(_signed(0x85EBCA6B, torch.int32))
    bits.bitwise_xor_(bits >> 15)
    return bits.mul_(_signed(0xC2B2AE35, torch.int32))
