"""The folder that a checkpoint will be: which tensor at which place of which file. Needs no torch."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.checkpoints.contents import Contents, StoredPiece, StoredWeights, pieces_in, shape_in_files
from refit.checkpoints.files import CONFIG_NAME, DTYPES, INDEX_NAME, SINGLE_NAME, StoredFolder, StoredTensor
from refit.config.quantisation import CODES_DTYPE, BlockFormat, scale_key
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.quantised import Grid
from refit.plan.sharding import ITEMSIZE, TensorSpec
from refit.predict.families.names import NamedModel, named_model
from refit.predict.families.parts import Parts, model_in_parts
from refit.predict.sides import parts_of, predict_side

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
    folder: Path,
    shape: ModelShape,
    dtype: Dtype,
    held: Mapping[str, TensorSpec],
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    block: BlockFormat | None = None,
    parts: Parts | None = None,
) -> tuple[PlannedFolder, Contents]:
    """The files of `shape` under the names of published checkpoints, in the dtypes that the side of `held` has.

    Where that has codes, `block` is their format, and `parts` are the tensors that it quantises one by one. All ranks
    find the same. Raises UsageError where a block has rows of several tensors of the files.
    """
    model, partial = model_in_parts(_model(shape, dtype), parts or {}), partial_of(folder)
    files = _divided(model, held, max_file_bytes, block)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[Path, bytes] = {}
    sizes: dict[Path, int] = {}
    for number, names in enumerate(files, 1):
        one = SINGLE_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        entries: dict[str, Any] = header
        for name, (shape_of, word, nbytes) in names.items():
            entries[name] = {"dtype": word, "shape": list(shape_of), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, as the library has it
        path, base = partial / one, 8 + len(text)
        headers[path], sizes[path] = struct.pack("<Q", len(text)) + text, base + offset
        for name, (shape_of, word, nbytes) in names.items():
            begin = base + entries[name]["data_offsets"][0]
            tensors[name] = StoredTensor(name, path, word, shape_of, begin, nbytes)
    index = None
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: each.path.name for name, each in tensors.items()},
        }
    stored = StoredFolder(partial, tensors, sizes, {})
    return PlannedFolder(folder, partial, stored, headers, sizes, index), _contents(stored, model, block)


def plan_side(
    folder: Path, shape: ModelShape, side: SideSpec, held: Mapping[str, TensorSpec] | None = None
) -> tuple[PlannedFolder, Contents]:
    """The files of a side of `shape`, which has the tensors `held`, or those that are predicted.

    Raises UsageError as `plan_folder`, and for codes that checkpoints do not have.
    """
    assert side.dtype is not None
    quantisation = side.quantisation
    if quantisation is not None and quantisation.format.scale_dtype != "float32":
        what = quantisation.dtype
        raise UsageError(f"--write-weights writes weights and block FP8, no {what}: leave one of them out")
    return plan_folder(
        folder,
        shape,
        side.dtype,
        held if held is not None else predict_side(shape, side).tensors,
        block=quantisation.format if quantisation is not None else None,
        parts=parts_of(shape, side),
    )


def config_of(
    values: Mapping[str, Any], dtype: Dtype, quantised: BlockFormat | None = None, stored: StoredFolder | None = None
) -> dict[str, Any]:
    """The config.json of a checkpoint: `values`, those of the model, with its dtype, and of codes among the `stored`
    tensors their blocks, and the modules that have none."""
    kept = {key: value for key, value in values.items() if key not in ("quantization_config", "torch_dtype")}
    found = {**kept, "dtype": dtype.value}
    if quantised is not None and stored is not None:
        plain = [
            name.removesuffix(".weight")
            for name, tensor in stored.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) > 1 and scale_key(name) not in stored.tensors
        ]
        block = [quantised.rows, quantised.columns]
        settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
        found["quantization_config"] = {**settings, "modules_to_not_convert": plain}
    return found


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
    model: NamedModel, held: Mapping[str, TensorSpec], max_file_bytes: int, block_format: BlockFormat | None
) -> list[dict[str, _Entry]]:
    """The tensors of each file by name."""
    files: list[dict[str, _Entry]] = [{}]
    filled = 0
    for block in model.blocks:
        for tensor in block.tensors:
            name, dtype = f"{block.prefix}{tensor.name}", held[block.key_prefix + tensor.row.key].dtype
            entries = {name: _entry(shape_in_files(tensor), dtype)}
            if dtype == CODES_DTYPE:
                assert block_format is not None
                scale_shape = Grid(tensor.shape, block_format).scale_shape
                entries[scale_key(name)] = _entry(scale_shape, block_format.scale_dtype)
            nbytes = sum(each[2] for each in entries.values())
            if filled and filled + nbytes > max_file_bytes:
                files.append({})
                filled = 0
            files[-1] |= entries
            filled += nbytes
    return files


_Entry = tuple[tuple[int, ...], str, int]
"""The shape of a tensor in a file, the header's word for its dtype, and its bytes."""


def _entry(shape: tuple[int, ...], dtype: str) -> _Entry:
    return shape, WORDS[dtype], math.prod(shape) * ITEMSIZE[dtype]


def _contents(stored: StoredFolder, model: NamedModel, block_format: BlockFormat | None) -> Contents:
    found: dict[str, list[StoredPiece]] = defaultdict(list)
    for block in model.blocks:
        for tensor in block.tensors:
            name = f"{block.prefix}{tensor.name}"
            weights, scales = StoredWeights(stored.tensors[name], tensor.shape), stored.tensors.get(scale_key(name))
            for below, piece in pieces_in(tensor, weights):
                key = block.key_prefix + below
                found[key].append(piece)
                if scales is not None and block_format is not None:
                    grids = Grid(model.logical[key].shape, block_format), Grid(tensor.shape, block_format)
                    found[scale_key(key)].append(_scales_of(piece, scales, *grids, name))
    return Contents(stored, found, ())


def _scales_of(piece: StoredPiece, scales: StoredTensor, logical: Grid, stored: Grid, name: str) -> StoredPiece:
    """The scales of the codes of a piece. Raises UsageError where a block lies partly in it."""
    if not (logical.is_aligned(piece.box) and stored.is_aligned(piece.held)):
        raise UsageError(
            f"--write-weights: blocks of {logical.format.text} of the destination have rows of {name} and of others: "
            "give --rl-inference-format vllm, which quantises each by itself, or leave --write-weights out"
        )
    weights = StoredWeights(scales, scales.shape)
    return StoredPiece(logical.scales(piece.box), stored.scales(piece.held), weights, piece.axes)
