"""Reads boxes of stored tensors with positioned reads: the bytes of a box, and few others.

A column slice of a mapped file touches every page of the tensor, and the kernel reads far ahead of each: all ranks of a
TP group would each read all of it. So nothing is mapped here. A box is a number of runs of bytes, all of one length:

    columns     0     2      5   8        rows 1 and 2, columns 2 to 5 of a tensor of 8 columns:
    row 1       . . [======] . . .        2 runs of 3 elements, 8 elements apart
    row 2       . . [======] . . .

Long runs are read one by one, after the kernel was told of those ahead. Short ones are read with the gaps between them,
since a page of the file comes as a whole anyway.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from refit.checkpoints.contents import StoredPiece, StoredWeights
from refit.checkpoints.files import DTYPES, StoredTensor
from refit.errors import RefitError
from refit.plan.box import Box

CHUNK_BYTES, CODES_CHUNK_BYTES = 16 << 20, 2 << 20
"""Most bytes that are read at once, of weights and of codes, of which dequantising makes eight times as many. It is the
memory that reading takes beside the weights."""

SHORT_RUN_BYTES = 1 << 10
"""Shorter runs are read with what is between them."""

AHEAD = 64
"""Runs that the kernel is told of before they are read."""


class Files:
    """The files of a folder, each opened once for long runs and once for short ones. `read_bytes` were read so far."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self.read_bytes = 0

    def read(
        self, tensor: StoredTensor, box: Box, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """`box` of a stored tensor in parts of at most `chunk_bytes`, in the dtype of the file.

        Raises RefitError where a file ends early or cannot be read.
        """
        dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype])
        itemsize = tensor.nbytes // max(1, math.prod(tensor.shape))
        for part in chunks(box, max(1, chunk_bytes // itemsize)):
            data = torch.empty(part.extents, dtype=dtype)
            self._fill(tensor, part, itemsize, data.view(-1).view(torch.uint8).numpy().data)
            yield part, data

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _fill(self, tensor: StoredTensor, box: Box, itemsize: int, into: memoryview) -> None:
        """Read a box into contiguous memory of its size."""
        runs = runs_of(box, tensor.shape)
        length, starts = runs.length * itemsize, [tensor.offset + start * itemsize for start in runs.starts]
        if len(starts) == 1:
            self._read(self._descriptor(tensor.path, is_strided=False), into, starts[0], tensor)
        elif length < SHORT_RUN_BYTES or 2 * length > starts[1] - starts[0]:
            self._read_with_gaps(tensor, starts, length, into)
        else:
            descriptor = self._descriptor(tensor.path, is_strided=True)
            for first in range(0, len(starts), AHEAD):
                ahead = starts[first : first + AHEAD]
                for start in ahead:
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
                for number, start in enumerate(ahead, first):
                    self._read(descriptor, into[number * length : (number + 1) * length], start, tensor)

    def _read_with_gaps(self, tensor: StoredTensor, starts: list[int], length: int, into: memoryview) -> None:
        descriptor, step = (
            self._descriptor(tensor.path, is_strided=False),
            max(1, CHUNK_BYTES // (starts[1] - starts[0])),
        )
        for first in range(0, len(starts), step):
            part = starts[first : first + step]
            whole = memoryview(bytearray(part[-1] + length - part[0]))
            self._read(descriptor, whole, part[0], tensor)
            for number, start in enumerate(part, first):
                begin = start - part[0]
                into[number * length : (number + 1) * length] = whole[begin : begin + length]

    def _read(self, descriptor: int, into: memoryview, offset: int, tensor: StoredTensor) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise RefitError(f"{tensor.path}: {tensor.name} cannot be read: {error.strerror}") from error
            if count == 0:
                raise RefitError(f"{tensor.path} ends at byte {offset + done:,}, {tensor.name} goes on behind it")
            done += count
        self.read_bytes += done

    def _descriptor(self, path: Path, *, is_strided: bool) -> int:
        if (path, is_strided) not in self._open:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise RefitError(f"{path} cannot be read: {error.strerror}") from error
            advice = os.POSIX_FADV_RANDOM if is_strided else os.POSIX_FADV_SEQUENTIAL
            os.posix_fadvise(descriptor, 0, 0, advice)
            self._open[path, is_strided] = descriptor
        return self._open[path, is_strided]


class Runs:
    """The elements of a box of a row-major tensor: `length` of them from each of `starts`, in order."""

    __slots__ = ("length", "starts")

    def __init__(self, length: int, starts: list[int]) -> None:
        self.length, self.starts = length, starts


def runs_of(box: Box, shape: tuple[int, ...]) -> Runs:
    """The runs of `box` in a tensor of `shape`."""
    last = len(shape)
    while last > 0 and box.extents[last - 1] == shape[last - 1]:
        last -= 1
    # Dims from `last` on are whole, so a run is all of them, times the extent of the one before.
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if last == 0:
        return Runs(box.volume, [0])
    dim = last - 1
    length = box.extents[dim] * strides[dim]
    starts = [box.offsets[dim] * strides[dim]]
    for outer in reversed(range(dim)):
        steps = range(box.offsets[outer], box.ends[outer])
        starts = [step * strides[outer] + start for step in steps for start in starts]
    return Runs(length, starts)


def chunks(box: Box, limit: int) -> Iterator[Box]:
    """`box` in boxes of at most `limit` elements, cut along leading dims."""
    dim = box.leading_dim
    if box.volume <= limit or dim is None:
        yield box
        return
    size = box.volume // box.extents[dim]
    if size > limit:
        for index in range(box.offsets[dim], box.ends[dim]):
            yield from chunks(box.narrow(dim, index, index + 1), limit)
        return
    step = limit // size
    for begin in range(box.offsets[dim], box.ends[dim], step):
        yield box.narrow(dim, begin, min(begin + step, box.ends[dim]))


def read_piece(files: Files, piece: StoredPiece) -> Iterator[tuple[Box, torch.Tensor]]:
    """The values of a piece: boxes of the logical tensor and what they hold, in parts. FP8 becomes float32."""
    weights = piece.weights
    chunk_bytes = CHUNK_BYTES if weights.scales is None else CODES_CHUNK_BYTES
    for part, data in files.read(weights.tensor, piece.held, chunk_bytes):
        moved = zip(part.offsets, piece.held.offsets, piece.box.offsets[-len(part.offsets) :], strict=True)
        offsets = tuple(offset - held + box for offset, held, box in moved)
        leading = len(piece.box.offsets) - len(part.offsets)
        box = Box((*piece.box.offsets[:leading], *offsets), (*piece.box.extents[:leading], *part.extents))
        values = data if weights.scales is None else _multiplied(files, weights, weights.scales, part, data)
        yield box, values.view(box.extents)


def _multiplied(
    files: Files, weights: StoredWeights, scales: StoredTensor, part: Box, codes: torch.Tensor
) -> torch.Tensor:
    """Codes times the scales of their blocks, which lie where blocks of the whole tensor do: float32."""
    rows, columns = weights.block
    first = (part.offsets[0] // rows, part.offsets[1] // columns)
    last = (-(-part.ends[0] // rows), -(-part.ends[1] // columns))
    wanted = Box(first, (last[0] - first[0], last[1] - first[1]))
    ((_, found),) = files.read(scales, wanted)
    spread = found.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    begin = (part.offsets[0] - first[0] * rows, part.offsets[1] - first[1] * columns)
    return codes.float().mul_(spread[begin[0] : begin[0] + part.extents[0], begin[1] : begin[1] + part.extents[1]])
