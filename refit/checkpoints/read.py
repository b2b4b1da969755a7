"""Reads boxes of stored tensors with positioned reads: the bytes of a box, and few others.

A column slice of a mapped file touches every page of the tensor, and the kernel reads far ahead of each: all ranks of a
TP group would each read all of it. So nothing is mapped here. A box is a number of runs of bytes, all of one length:

    columns     0     2      5   8        rows 1 and 2, columns 2 to 5 of a tensor of 8 columns:
    row 1       . . [======] . . .        2 runs of 3 elements, 8 elements apart
    row 2       . . [======] . . .

Long runs are read one by one, after the kernel was told of those ahead. Where other ranks of the host read what is
between them, it is told of all at once, so that the disk is read once, in order, for all of them. Where runs are short
the whole rows are read, since a page of the file comes as a whole anyway.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from refit.checkpoints.contents import MXFP4_BLOCK, Form, StoredPiece, StoredWeights
from refit.checkpoints.files import DTYPES, StoredTensor
from refit.errors import RefitError
from refit.plan.box import Box

CHUNK_BYTES, CODES_CHUNK = 16 << 20, 2 << 20
"""Most bytes that are read at once, and most weights that are made of codes at once: the memory that reading takes
beside the weights, a few times over."""

SHORT_RUN_BYTES = 1 << 10
"""Shorter runs are read with what is between them."""

AHEAD = 64
"""Runs that the kernel is told of before they are read."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of E2M1 stand for (OCP Microscaling Formats, version 1.0, section 5.3.3)."""


class Files:
    """The files of a folder, each opened once for long runs and once for short ones. `read_bytes` were read so far.

    `shared`: other ranks of this host read the rest of tensors of which this one reads columns.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._open: dict[tuple[Path, bool], int] = {}
        self.read_bytes = 0

    def read(
        self, tensor: StoredTensor, shape: tuple[int, ...], box: Box, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[tuple[Box, torch.Tensor]]:
        """`box` of a stored tensor, seen in `shape`, in parts of at most `chunk_bytes`, in the dtype of the file.

        Raises RefitError where a file ends early or cannot be read.
        """
        dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype])
        for part in chunks(widened(box, shape, dtype.itemsize), max(1, chunk_bytes // dtype.itemsize)):
            wanted = part.intersect(box)
            if wanted is not None:
                data = torch.empty(part.extents, dtype=dtype)
                self._fill(tensor, runs_of(part, shape), dtype.itemsize, data.view(-1).view(torch.uint8).numpy().data)
                yield wanted, data[wanted.slices_within(part)]

    def whole(self, tensor: StoredTensor, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """The same as one tensor."""
        ((_, data),) = self.read(tensor, shape, box, 1 << 62)
        return data

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _fill(self, tensor: StoredTensor, runs: Runs, itemsize: int, into: memoryview) -> None:
        """Read runs into contiguous memory of their size."""
        length, starts = runs.length * itemsize, [tensor.offset + start * itemsize for start in runs.starts]
        is_strided = len(starts) > 1
        descriptor = self._descriptor(tensor.path, is_strided=is_strided)
        if is_strided and self._shared:
            os.posix_fadvise(descriptor, starts[0], starts[-1] + length - starts[0], os.POSIX_FADV_WILLNEED)
        for first in range(0, len(starts), AHEAD):
            ahead = starts[first : first + AHEAD]
            for start in ahead if is_strided and not self._shared else ():
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
            for number, start in enumerate(ahead, first):
                self._read(descriptor, into[number * length : (number + 1) * length], start, tensor)

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


@dataclass(frozen=True, slots=True)
class Runs:
    """The elements of a box of a row-major tensor: `length` of them from each of `starts`, in order."""

    length: int
    starts: list[int]


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


def widened(box: Box, shape: tuple[int, ...], itemsize: int) -> Box:
    """`box` with its last dims whole, as many as it takes until runs are long and at most half of what they lie in."""
    for dim in reversed(range(len(shape))):
        size, outer = math.prod(shape[dim + 1 :]) * itemsize, math.prod(box.extents[:dim])
        is_long = box.extents[dim] * size >= SHORT_RUN_BYTES and 2 * box.extents[dim] <= shape[dim]
        if outer == 1 or (is_long and box.extents[dim] < shape[dim]):
            break
        box = box.narrow(dim, 0, shape[dim])
    return box


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
    """The values of a piece, in parts: boxes of the logical tensor and what they hold. Codes become float32."""
    weights = piece.weights
    if weights.form is Form.PLAIN:
        parts = files.read(weights.tensor, weights.shape, piece.held)
    else:
        decode = _fp8 if weights.form is Form.FP8 else _mxfp4
        parts = ((part, decode(files, weights, part)) for part in chunks(piece.held, CODES_CHUNK))
    for part, data in parts:
        box, others = piece.logical(part), (dim for dim in range(data.ndim) if dim not in piece.axes)
        yield box, data.permute(*piece.axes, *others).reshape(box.extents)


def _fp8(files: Files, weights: StoredWeights, part: Box) -> torch.Tensor:
    """Codes times the scales of their blocks, which lie where blocks of the whole tensor do: float32."""
    assert weights.scales is not None
    rows, columns = weights.block
    codes = files.whole(weights.tensor, weights.shape, part)
    first = (part.offsets[0] // rows, part.offsets[1] // columns)
    last = (-(-part.ends[0] // rows), -(-part.ends[1] // columns))
    wanted = Box(first, (last[0] - first[0], last[1] - first[1]))
    scales = files.whole(weights.scales, weights.scales.shape, wanted).float()
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    begin = (part.offsets[0] - first[0] * rows, part.offsets[1] - first[1] * columns)
    return codes.float().mul_(spread[begin[0] : begin[0] + part.extents[0], begin[1] : begin[1] + part.extents[1]])


def _mxfp4(files: Files, weights: StoredWeights, part: Box) -> torch.Tensor:
    """E2M1 codes, the first of two in the low half of a byte, times powers of two with a bias of 127: float32."""
    assert weights.scales is not None
    *outer, columns = weights.shape
    last = len(outer)
    first, end = part.offsets[last] // MXFP4_BLOCK, -(-part.ends[last] // MXFP4_BLOCK)
    half, num = MXFP4_BLOCK // 2, end - first
    codes = files.whole(weights.tensor, (*outer, columns // 2), part.narrow(last, first * half, end * half)).int()
    scales = files.whole(weights.scales, (*outer, columns // MXFP4_BLOCK), part.narrow(last, first, end))
    values = torch.tensor(FP4_VALUES)[torch.stack((codes & 15, codes >> 4), -1)]
    blocks = values.view(*part.extents[:last], num, MXFP4_BLOCK)
    found = torch.ldexp(blocks, (scales.int() - 127)[..., None]).view(*part.extents[:last], num * MXFP4_BLOCK)
    begin = part.offsets[last] - first * MXFP4_BLOCK
    return found[..., begin : begin + part.extents[last]]
