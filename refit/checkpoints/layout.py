"""The folder that a checkpoint will be: which tensor at which place of which file. Needs no torch."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.checkpoints.contents import Contents, StoredPiece, StoredWeights, pieces_in, shape_in_files
from refit.checkpoints.files import CONFIG_NAME, DTYPES, INDEX_NAME, SINGLE_NAME, StoredFolder, StoredTensor
from refit.config.shape import Dtype, ModelShape
from refit.plan.sharding import ITEMSIZE, TensorSpec
from refit.predict.families.names import NamedModel, NamedTensor, named_model

MAX_FILE_BYTES = 5 * 10**9
"""Most bytes of tensors in a file, unless one tensor has more."""

WORDS = {name: word for word, name in DTYPES.items()}
COPIED_SUFFIXES, MAX_COPIED_BYTES = (".json", ".txt", ".model", ".jinja"), 100 << 20
"""Files beside a checkpoint's weights that belong to it: those of tokenizers, and of generating."""


@dataclass(frozen=True, slots=True)
class PlannedFolder:
    """`folder` will have the name, `partial` is what it is called until it is whole. Paths are those below `partial`.

    `index` is None where there is one file.
    """

    folder: Path
    partial: Path
    stored: StoredFolder
    headers: Mapping[Path, bytes]
    sizes: Mapping[Path, int]
    index: Mapping[str, Any] | None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def partial_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def plan_folder(
    folder: Path, shape: ModelShape, dtype: Dtype, held: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[PlannedFolder, Contents]:
    """The files of `shape` under the names of published checkpoints, in the dtypes that the side of `held` has.

    All ranks find the same.
    """
    model, partial = _model(shape, dtype), partial_of(folder)
    files = _divided(model, held, max_file_bytes)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[Path, bytes] = {}
    sizes: dict[Path, int] = {}
    for number, names in enumerate(files, 1):
        one = SINGLE_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        entries: dict[str, Any] = header
        for name, (tensor, word, nbytes) in names.items():
            entries[name] = {
                "dtype": word,
                "shape": list(shape_in_files(tensor)),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, as the library has it
        path, base = partial / one, 8 + len(text)
        headers[path], sizes[path] = struct.pack("<Q", len(text)) + text, base + offset
        for name, (tensor, word, nbytes) in names.items():
            begin = base + entries[name]["data_offsets"][0]
            tensors[name] = StoredTensor(name, path, word, shape_in_files(tensor), begin, nbytes)
    index = None
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: each.path.name for name, each in tensors.items()},
        }
    stored = StoredFolder(partial, tensors, sizes, {})
    return PlannedFolder(folder, partial, stored, headers, sizes, index), _contents(stored, model)


def config_of(values: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """The config.json of a checkpoint of plain weights: `values`, those of the model, with its dtype."""
    kept = {key: value for key, value in values.items() if key not in ("quantization_config", "torch_dtype")}
    return {**kept, "dtype": dtype.value}


def files_beside(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that go with it, beside its weights and its config.json."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in COPIED_SUFFIXES
        and path.name not in (CONFIG_NAME, INDEX_NAME)
        and path.stat().st_size <= MAX_COPIED_BYTES
    ]


def _model(shape: ModelShape, dtype: Dtype) -> NamedModel:
    named = named_model(shape, dtype)
    published = shape.experts is None or named.family.single_experts
    return named_model(shape, dtype, single_experts=True) if published else named


def _divided(
    model: NamedModel, held: Mapping[str, TensorSpec], max_file_bytes: int
) -> list[dict[str, tuple[NamedTensor, str, int]]]:
    """The tensors of each file by name, with the header's word for the dtype and the bytes."""
    files: list[dict[str, tuple[NamedTensor, str, int]]] = [{}]
    filled = 0
    for block in model.blocks:
        for tensor in block.tensors:
            dtype = held[block.key_prefix + tensor.row.key].dtype
            nbytes = ITEMSIZE[dtype]
            for size in tensor.shape:
                nbytes *= size
            if filled and filled + nbytes > max_file_bytes:
                files.append({})
                filled = 0
            files[-1][f"{block.prefix}{tensor.name}"] = (tensor, WORDS[dtype], nbytes)
            filled += nbytes
    return files


def _contents(stored: StoredFolder, model: NamedModel) -> Contents:
    found: dict[str, list[StoredPiece]] = defaultdict(list)
    for block in model.blocks:
        for tensor in block.tensors:
            weights = StoredWeights(stored.tensors[f"{block.prefix}{tensor.name}"], tensor.shape)
            for key, piece in pieces_in(tensor, weights):
                found[block.key_prefix + key].append(piece)
    return Contents(stored, found, ())
