"""Which boxes of a model's logical tensors the tensors of a folder have, checked name by name. Needs no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from refit.checkpoints.files import CONFIG_NAME, DTYPES, StoredFolder, StoredTensor
from refit.config.shape import Dtype, ModelShape
from refit.errors import UsageError
from refit.plan.box import Box
from refit.predict.families.names import NamedModel, NamedTensor, named_model
from refit.predict.families.parts import Parts, model_in_parts
from refit.predict.families.tables import closest_family

PLAIN_DTYPES = ("BF16", "F16", "F32")
CODES_DTYPE, SCALE_SUFFIX = "F8_E4M3", "_scale_inv"
"""Codes of block FP8, and what the name of their scales ends with (DeepSeek-V3's checkpoints)."""

MAX_NAMES = 3
"""Most tensors that a message names."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A tensor of weights in a file. Codes of FP8 have `scales`, one for each `block` of (rows, columns)."""

    tensor: StoredTensor
    scales: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """`held`, a box of `weights`, has the elements of `box`, a box of a logical tensor.

    `held` lacks leading dims of `box` that are 1 there, as those of single experts do.
    """

    box: Box
    held: Box
    weights: StoredWeights

    def within(self, box: Box) -> StoredPiece | None:
        """The part of this piece in `box`; None where there is none."""
        part = self.box.intersect(box)
        if part is None:
            return None
        dims = len(self.held.extents)
        moved = zip(part.offsets[-dims:], self.box.offsets[-dims:], self.held.offsets, strict=True)
        held = Box(tuple(offset - begin + first for offset, begin, first in moved), part.extents[-dims:])
        return StoredPiece(part, held, self.weights)


class Contents:
    """The pieces of every logical tensor of a model in the files of a folder. `notes` say what is not as in them."""

    def __init__(
        self, folder: StoredFolder, pieces: Mapping[str, Iterable[StoredPiece]], notes: tuple[str, ...]
    ) -> None:
        self.folder, self.notes = folder, notes
        self._pieces: dict[str, list[StoredPiece]] = {}
        self._by_expert: dict[tuple[str, int], list[StoredPiece]] = defaultdict(list)
        for key, found in pieces.items():
            self._pieces[key] = list(found)
            for piece in self._pieces[key]:
                if len(piece.held.extents) < len(piece.box.extents):
                    self._by_expert[key, piece.box.offsets[0]].append(piece)

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def pieces_of(self, key: str, box: Box) -> Iterator[StoredPiece]:
        """What `box` of a logical tensor has in each tensor of the files. Rows of padding are in none."""
        single = (key, box.offsets[0]) if box.extents and box.extents[0] == 1 else None
        for piece in self._by_expert[single] if single in self._by_expert else self._pieces[key]:
            found = piece.within(box)
            if found is not None:
                yield found

    def num_rows(self, key: str) -> int:
        """The rows that the files have of a logical tensor: rows behind them are padding."""
        return max(piece.box.ends[0] for piece in self._pieces[key])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the model has, scales included."""
        held = {id(piece.weights): piece.weights for pieces in self._pieces.values() for piece in pieces}
        return sum(each.tensor.nbytes + (each.scales.nbytes if each.scales else 0) for each in held.values())

    @property
    def num_tensors(self) -> int:
        return len({piece.weights.tensor.name for pieces in self._pieces.values() for piece in pieces})


def contents_of(folder: StoredFolder, shape: ModelShape, dtype: Dtype, parts: Parts | None = None) -> Contents:
    """The tensors of `shape` in `folder`. With `parts`, those take the place of their fused tensors.

    Raises UsageError, naming tensors, where some are missing, are not the model's, or have another shape or dtype.
    """
    model = _closest(folder, shape, dtype)
    if parts:
        model = model_in_parts(model, parts)
    needed = {
        f"{block.prefix}{tensor.name}": (block.key_prefix, tensor) for block in model.blocks for tensor in block.tensors
    }
    _check_missing(folder, shape, needed)
    notes = _check_surplus(folder, shape, needed)
    found: dict[str, list[StoredPiece]] = defaultdict(list)
    dtypes: Counter[str] = Counter()
    for name, (key_prefix, tensor) in needed.items():
        weights = _weights(folder, name, tensor)
        dtypes[weights.tensor.dtype] += 1
        for piece in tensor.pieces:
            found[key_prefix + piece.key].append(StoredPiece(piece.box, piece.held, weights))
    return Contents(folder, found, (*notes, *_dtype_notes(dtypes, dtype)))


def _closest(folder: StoredFolder, shape: ModelShape, dtype: Dtype) -> NamedModel:
    """The model as published checkpoints name its tensors, or as transformers has them in memory."""
    family = closest_family(shape)
    named = [named_model(shape, dtype)]
    if shape.experts is None or family.single_experts:
        named.insert(0, named_model(shape, dtype, single_experts=True))
    return max(named, key=lambda model: sum(name in folder.tensors for name in _names(model)))


def _names(model: NamedModel) -> Iterator[str]:
    return (f"{block.prefix}{tensor.name}" for block in model.blocks for tensor in block.tensors)


def _check_missing(folder: StoredFolder, shape: ModelShape, needed: Mapping[str, Any]) -> None:
    missing = [name for name in needed if name not in folder.tensors]
    if missing:
        raise UsageError(
            f"{folder.path} lacks {len(missing):,} of the {len(needed):,} tensors of the model: {_listed(missing)}: "
            f"{_belongs(folder)}"
        )


def _check_surplus(folder: StoredFolder, shape: ModelShape, needed: Mapping[str, Any]) -> list[str]:
    """Raise UsageError for tensors of another model. Returns notes on those that are left out."""
    left_out: dict[str, list[str]] = defaultdict(list)
    surplus = []
    num_layers, num_next = shape.num_layers, folder.config.get("num_nextn_predict_layers")
    predicting = {f"model.layers.{num_layers + number}." for number in range(num_next if type(num_next) is int else 0)}
    for name in folder.tensors:
        if name in needed or (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in needed):
            continue
        if name == "lm_head.weight" and shape.tied_embeddings:
            left_out["the embedding is the output layer too"].append(name)
        elif name.endswith(".rotary_emb.inv_freq"):
            left_out["they follow from config.json"].append(name)
        elif any(name.startswith(prefix) for prefix in predicting):
            left_out["layers of multi-token prediction are not built from a config.json"].append(name)
        else:
            surplus.append(name)
    if surplus:
        raise UsageError(
            f"{folder.path} has {len(surplus):,} tensors that the model has not: {_listed(surplus)}: {_belongs(folder)}"
        )
    return [f"not read: {_listed(names)}: {why}" for why, names in left_out.items()]


def _weights(folder: StoredFolder, name: str, tensor: NamedTensor) -> StoredWeights:
    stored = folder.tensors[name]
    if stored.shape != tensor.shape:
        raise UsageError(
            f"{name} is {list(stored.shape)} in {stored.path}, {list(tensor.shape)} in the model: {_belongs(folder)}"
        )
    if stored.dtype in PLAIN_DTYPES:
        return StoredWeights(stored)
    scales = folder.tensors.get(name + SCALE_SUFFIX)
    if stored.dtype != CODES_DTYPE or scales is None or len(stored.shape) != 2:
        lacking = f" without {name}{SCALE_SUFFIX}" if stored.dtype == CODES_DTYPE and scales is None else ""
        raise UsageError(
            f"{name} is {DTYPES.get(stored.dtype, stored.dtype)}{lacking} in {stored.path}: read are "
            f"{', '.join(DTYPES[dtype] for dtype in PLAIN_DTYPES)} and block FP8 (e4m3 with scales)"
        )
    block = _block(folder, name)
    expected = tuple(-(-size // step) for size, step in zip(stored.shape, block, strict=True))
    if scales.shape != expected or scales.dtype not in PLAIN_DTYPES:
        raise UsageError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)} in {scales.path}, blocks of {block[0]} x {block[1]} "
            f"of {list(stored.shape)} have {list(expected)} in F32: weight_block_size in {CONFIG_NAME} is another's"
        )
    return StoredWeights(stored, scales, block)


def _block(folder: StoredFolder, name: str) -> tuple[int, int]:
    """The rows and columns of a block of FP8, as the folder's config.json has them. Libraries guess them otherwise."""
    settings = folder.config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise UsageError(
            f"{name} is FP8, and {folder.path / CONFIG_NAME} has no quantization_config with a weight_block_size of "
            "two numbers: its scales cannot be told apart"
        )
    return size[0], size[1]


def _dtype_notes(dtypes: Mapping[str, int], dtype: Dtype) -> Iterator[str]:
    for name, count in sorted(dtypes.items()):
        if name == CODES_DTYPE:
            yield f"{count:,} tensors are block FP8 in the files: codes x scales, rounded to the source's dtype"
        elif DTYPES[name] != dtype.value:
            yield f"{count:,} tensors are {DTYPES[name]} in the files, and have the source's dtypes in it"


def _belongs(folder: StoredFolder) -> str:
    config = folder.path / CONFIG_NAME
    return (
        f"{config} does not belong to these weights, or other flags change it"
        if folder.config
        else "give their config.json with --hf-config"
    )


def _listed(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")
