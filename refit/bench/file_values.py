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
from refit.checkpoints.contents import Contents, StoredPiece, contents_of
from refit.checkpoints.files import read_folder
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
            inner = rows[places] % tensor.shape[-2] if len(tensor.shape) > 1 else rows[places]
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
            begin = piece.box.offsets[-1] - columns[0] if piece.box.offsets else 0
            wide = slice(begin, begin + (piece.box.extents[-1] if piece.box.extents else 1))
            if len(tensor.shape) < 2:
                into[0, wide] = self._tensor(piece).view(-1)[_last(piece.held)]
                continue
            within = (rows >= piece.box.offsets[-2]) & (rows < piece.box.ends[-2])
            picked = rows[within] - piece.box.offsets[-2] + piece.held.offsets[-2]
            into[within.nonzero()[:, 0], wide] = self._rows(piece, picked).to(into.dtype)

    def _rows(self, piece: StoredPiece, picked: torch.Tensor) -> torch.Tensor:
        """Rows of a stored matrix in the columns of the piece, codes times scales."""
        matrix = self._tensor(piece)[piece.held.offsets[:-2]]
        columns = _last(piece.held)
        found = matrix[picked, columns] if not _is_range(picked) else matrix[picked[0] : picked[-1] + 1, columns]
        scales = piece.weights.scales
        if scales is None:
            return found
        high, wide = piece.weights.block
        numbers = torch.arange(columns.start, columns.stop) // wide
        return found.float() * self._named(scales.name, scales.path).float()[picked // high][:, numbers]

    def _tensor(self, piece: StoredPiece) -> torch.Tensor:
        return self._named(piece.weights.tensor.name, piece.weights.tensor.path)

    def _named(self, name: str, path: Path) -> torch.Tensor:
        if name not in self._tensors:
            if path not in self._files:
                from safetensors import safe_open

                self._files[path] = safe_open(path, framework="pt")
            self._tensors[name] = self._files[path].get_tensor(name)
        return self._tensors[name]


def _dtype(tensor: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def _last(held: Box) -> slice:
    return slice(held.offsets[-1], held.ends[-1]) if held.offsets else slice(0, 1)


def _is_range(rows: torch.Tensor) -> bool:
    return int(rows[-1]) - int(rows[0]) + 1 == len(rows)


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
