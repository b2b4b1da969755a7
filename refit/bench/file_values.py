"""The oracle's values where a source holds a checkpoint: those of its files, read again by another reader.

The source was filled with positioned reads (`refit.checkpoints.read`). Here the safetensors library maps the files, and
rows are picked from its tensors one by one, on the rank that checks. So a value that was read, dequantised, moved or
cut wrongly differs. Both readers share the tables of names and the headers' check, nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from refit.bench.session import Session
from refit.bench.sides import Side
from refit.checkpoints.contents import MXFP4_BLOCK, Contents, Form, StoredPiece, StoredWeights, contents_of
from refit.checkpoints.files import StoredTensor, read_folder
from refit.checkpoints.load import load
from refit.config.scenario import Scenario
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.encodings.oracle import PlainPart
from refit.memory.rows import Rows
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.predict.sides import parts_of


def source_contents(scenario: Scenario) -> Contents:
    """What the folder of `--source-weights` has of the scenario's model. Raises UsageError as `contents_of`."""
    assert scenario.source_weights is not None
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    return _contents(scenario.source_weights, scenario.model, scenario.source.dtype, None)


def file_values(scenario: Scenario) -> FileValues:
    """The values of the folder of `--source-weights`, in the parts that the destination quantises one by one."""
    dtype = scenario.source.dtype
    assert dtype is not None
    return FileValues(_contents_in_parts(scenario), getattr(torch, dtype.value))


def _contents_in_parts(scenario: Scenario) -> Contents:
    """Those of the source as a refit to the scenario's destination takes it."""
    assert scenario.source_weights is not None
    assert scenario.model is not None
    assert scenario.source.dtype is not None
    return _contents(scenario.source_weights, scenario.model, scenario.source.dtype, scenario.destination)


@functools.lru_cache(maxsize=2)  # many parts of one run ask for it
def _contents(folder: Path, shape: ModelShape, dtype: Dtype, destination: SideSpec | None) -> Contents:
    parts = parts_of(shape, destination) if destination is not None else None
    return contents_of(read_folder(folder), shape, dtype, parts)


def reload_source(session: Session, source: Side) -> None:
    """Fill the source, as it is or in parts, from its checkpoint again, where it has one and holds something else."""
    if session.scenario.source_weights is not None and source.weights is not None:
        session.enter("load weights again")
        contents = source_contents(session.scenario)
        if not all(shard.tensor.key in contents for shard in source.weights):
            contents = _contents_in_parts(session.scenario)
        load(source.weights, contents)


class FileValues(PlainPart):
    """Real weights: the same in every iteration. What lies behind the rows of the files is padding, zero."""

    is_real = True

    def __init__(self, contents: Contents, held: torch.dtype | None = None) -> None:
        """`held` is the dtype to which the source has rounded them, where that is one of 16 bits."""
        self._contents, self._held = contents, held
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[Path, Any] = {}

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        found = torch.zeros(block.data.shape, dtype=torch.float32 if tensor.itemsize < 4 else _dtype(tensor))
        rows, columns = block.row_numbers.cpu(), (block.first_column, block.first_column + found.shape[1])
        for leading, places in _by_leading_index(rows, tensor.shape):
            # In a matrix, rows behind the last one are padding that the destination has, and not the source.
            inner = rows[places] % tensor.shape[-2] if len(tensor.shape) > 2 else rows[places]
            self._fill(found[places], tensor, leading, inner, columns)
        if self._held is not None and self._held.itemsize == 2 and tensor.itemsize == 2:
            found = found.to(self._held)
        return found.to(_dtype(tensor)).to(block.data.device)

    def _fill(
        self,
        into: torch.Tensor,
        tensor: TensorSpec,
        leading: tuple[int, ...],
        rows: torch.Tensor,
        columns: tuple[int, int],
    ) -> None:
        """Write what the files have of `rows`, which ascend, and of a range of columns of one matrix."""
        first, last = int(rows[0]), int(rows[-1])
        width = columns[1] - columns[0]
        if len(tensor.shape) < 2:
            box = Box(columns[:1] * len(tensor.shape), (width,) * len(tensor.shape))
        else:
            box = Box((*leading, first, columns[0]), (*(1 for _ in leading), last + 1 - first, width))
        for piece in self._contents.pieces_of(tensor.key, box):
            found = self._values(piece)
            begin = piece.box.offsets[-1] - columns[0] if piece.box.offsets else 0
            wide = slice(begin, begin + found.shape[-1])
            if len(tensor.shape) < 2:
                into[0, wide] = found[0]
                continue
            within = (rows >= piece.box.offsets[-2]) & (rows < piece.box.ends[-2])
            picked = rows[within] - piece.box.offsets[-2]
            if len(picked) == len(found):
                into[within.nonzero()[:, 0], wide] = found.to(into.dtype)
            else:
                into[within.nonzero()[:, 0], wide] = found[picked].to(into.dtype)

    def _values(self, piece: StoredPiece) -> torch.Tensor:
        """What the file has of a piece, as a matrix; a view of it where these are no codes."""
        weights, place = piece.weights, piece.held.slices_within(Box.whole(piece.weights.shape))
        stored = self._named(weights.tensor)
        if weights.form is Form.PLAIN:
            found = stored.view(weights.shape)[place]
        elif weights.form is Form.FP8:
            assert weights.scales is not None
            found = stored[place].float()
            numbers = [
                torch.arange(each.start, each.stop) // step for each, step in zip(place, weights.block, strict=True)
            ]
            found *= self._named(weights.scales).float()[numbers[0]][:, numbers[1]]
        else:
            found = self._mxfp4(weights, place)
        order = [dim for dim in range(found.ndim) if dim not in piece.axes] + [*piece.axes]
        found = found.permute(order)
        return found[(0,) * (found.ndim - 2)] if found.ndim > 1 else found.view(1, -1)

    def _mxfp4(self, weights: StoredWeights, place: tuple[slice, ...]) -> torch.Tensor:
        """Each code by its sign, exponent and mantissa, 1, 2 and 1 bits, times a power of two."""
        assert weights.scales is not None
        *outer, columns = weights.shape
        codes = self._named(weights.tensor).view(*outer, columns // 2)[place[:-1]]
        exponents = self._named(weights.scales).view(*outer, columns // MXFP4_BLOCK)[place[:-1]].float() - 127
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., place[-1]].int()
        exponent, mantissa = (codes >> 1) & 3, (codes & 1) / 2
        sizes = torch.where(exponent == 0, mantissa, (1 + mantissa) * 2.0 ** (exponent - 1))
        numbers = torch.arange(place[-1].start, place[-1].stop) // MXFP4_BLOCK
        return torch.where(codes >= 8, -sizes, sizes) * torch.exp2(exponents[..., numbers])

    def _named(self, tensor: StoredTensor) -> torch.Tensor:
        name, path = tensor.name, tensor.path
        if name not in self._tensors:
            if path not in self._files:
                from safetensors import safe_open

                self._files[path] = safe_open(path, framework="pt")
            self._tensors[name] = self._files[path].get_tensor(name)
        return self._tensors[name]


def _dtype(tensor: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def _by_leading_index(rows: torch.Tensor, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], slice]]:
    """The index in all dims but the last two, and the places of its rows among `rows`, which ascend."""
    if len(shape) < 3:
        yield (), slice(0, len(rows))
        return
    numbers, counts = torch.unique_consecutive(rows // shape[-2], return_counts=True)
    begin = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        leading: list[int] = []
        for size in reversed(shape[1:-2]):
            number, index = divmod(number, size)
            leading.insert(0, index)
        yield (number, *leading), slice(begin, begin + count)
        begin += count
