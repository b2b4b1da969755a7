"""Which boxes of a model's logical tensors the tensors of a folder have, checked name by name. Needs no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from refit.checkpoints.files import CONFIG_NAME, DTYPES, StoredFolder, StoredTensor
from refit.config.shape import Dtype, ModelShape
from refit.errors import UsageError
from refit.plan.box import Box
from refit.predict.families.names import NamedModel, NamedTensor, named_model
from refit.predict.families.parts import Parts, model_in_parts
from refit.predict.families.tables import closest_family


class Form(Enum):
    """How a file holds weights. The members' values are what notes say of them."""

    PLAIN = "values"
    FP8 = "block FP8 in the files: codes x scales, rounded to the source's dtype"
    MXFP4 = "MXFP4 in the files: codes x scales, rounded to the source's dtype"


PLAIN_DTYPES = ("BF16", "F16", "F32")
CODES_DTYPE, SCALE_SUFFIX = "F8_E4M3", "_scale_inv"
"""Codes of block FP8, and what the name of their scales ends with (DeepSeek-V3's checkpoints)."""

MXFP4_SUFFIXES, MXFP4_BLOCK = ("_blocks", "_scales"), 32
"""What names of MXFP4 end with in place of the weights (gpt-oss), and the weights that have one scale."""

MAX_NAMES = 3
"""Most tensors that a message names."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A tensor of weights in a file. `shape` is that of the weights in the order in which the file has them.

    Codes of FP8 have `scales`, one for each `block` of (rows, columns). Those of MXFP4, two in a byte, have one for
    each 32 of the last dim: the file has `[..., columns / 32, 16]` bytes, and `[..., columns / 32]` scales.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]
    form: Form = Form.PLAIN
    scales: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """`held`, a box of `weights`, has the elements of `box`, a box of a logical tensor.

    `held` lacks leading dims of `box` that are 1 there, as those of single experts do. `axes` are the dims of `held` in
    the order in which `box` has them; others are of a single element.
    """

    box: Box
    held: Box
    weights: StoredWeights
    axes: tuple[int, ...]

    def within(self, box: Box) -> StoredPiece | None:
        """The part of this piece in `box`; None where there is none."""
        part = self.box.intersect(box)
        if part is None:
            return None
        offsets, extents, lacking = [*self.held.offsets], [*self.held.extents], len(part.offsets) - len(self.axes)
        for number, dim in enumerate(self.axes, lacking):
            offsets[dim] += part.offsets[number] - self.box.offsets[number]
            extents[dim] = part.extents[number]
        return StoredPiece(part, Box(tuple(offsets), tuple(extents)), self.weights, self.axes)

    def logical(self, held: Box) -> Box:
        """The box of the logical tensor with the elements of `held`, a box within that of this piece."""
        offsets, extents, lacking = [*self.box.offsets], [*self.box.extents], len(self.box.offsets) - len(self.axes)
        for number, dim in enumerate(self.axes, lacking):
            offsets[number] += held.offsets[dim] - self.held.offsets[dim]
            extents[number] = held.extents[dim]
        return Box(tuple(offsets), tuple(extents))


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
                if len(piece.axes) < len(piece.box.extents):
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
    dtypes: Counter[str | Form] = Counter()
    for name, (key_prefix, tensor) in needed.items():
        weights = _weights(folder, name, tensor)
        dtypes[weights.tensor.dtype if weights.form is Form.PLAIN else weights.form] += 1
        for key, piece in pieces_in(tensor, weights):
            found[key_prefix + key].append(piece)
    return Contents(folder, found, (*notes, *_dtype_notes(dtypes, dtype)))


def pieces_in(tensor: NamedTensor, weights: StoredWeights) -> Iterator[tuple[str, StoredPiece]]:
    """The pieces of `tensor`, by logical key below its block's prefix, in `weights`, which hold it."""
    for piece in tensor.pieces:
        held, dims = piece.held, len(piece.held.offsets)
        axes = piece.axes or tuple(range(dims))
        if weights.form is Form.MXFP4:  # the dim behind the experts' comes last
            order = (0, *range(2, dims), 1)
            held = Box(tuple(held.offsets[dim] for dim in order), tuple(held.extents[dim] for dim in order))
            axes = tuple(order.index(dim) for dim in axes)
        yield piece.key, StoredPiece(piece.box, held, weights, axes)


def shape_in_files(tensor: NamedTensor) -> tuple[int, ...]:
    """The shape of `tensor` in a file: its memory may lie in more dims than that."""
    return tensor.stored or tensor.shape


def _closest(folder: StoredFolder, shape: ModelShape, dtype: Dtype) -> NamedModel:
    """The model as published checkpoints name its tensors, or as transformers has them in memory."""
    family = closest_family(shape)
    named = [named_model(shape, dtype)]
    if shape.experts is None or family.single_experts:
        named.insert(0, named_model(shape, dtype, single_experts=True))
    return max(named, key=lambda model: sum(_is_there(folder, name) for name in _names(model)))


def _is_there(folder: StoredFolder, name: str) -> bool:
    return name in folder.tensors or all(name + suffix in folder.tensors for suffix in MXFP4_SUFFIXES)


def _names(model: NamedModel) -> Iterator[str]:
    return (f"{block.prefix}{tensor.name}" for block in model.blocks for tensor in block.tensors)


def _check_missing(folder: StoredFolder, shape: ModelShape, needed: Mapping[str, Any]) -> None:
    missing = [name for name in needed if not _is_there(folder, name)]
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
        suffix = next((each for each in (SCALE_SUFFIX, *MXFP4_SUFFIXES) if name.endswith(each)), "")
        if name in needed or name.removesuffix(suffix) in needed:
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
    if name not in folder.tensors:
        return mxfp4_weights(folder, name, tensor)
    stored, shape = folder.tensors[name], shape_in_files(tensor)
    if stored.shape != shape:
        raise UsageError(
            f"{name} is {list(stored.shape)} in {stored.path}, {list(shape)} in the model: {_belongs(folder)}"
        )
    if stored.dtype in PLAIN_DTYPES:
        return StoredWeights(stored, tensor.shape)
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
    return StoredWeights(stored, stored.shape, Form.FP8, scales, block)


def mxfp4_weights(folder: StoredFolder, name: str, tensor: NamedTensor) -> StoredWeights:
    """Codes lie behind one another along the inputs of the product, which are dim 1 of `tensor` and the last here."""
    blocks, scales = (folder.tensors[name + suffix] for suffix in MXFP4_SUFFIXES)
    experts, inputs, *others = tensor.shape
    rows = [*shape_in_files(tensor)[2:]]
    expected = [experts, *rows, -(-inputs // MXFP4_BLOCK)]
    if [*blocks.shape] != [*expected, MXFP4_BLOCK // 2] or [*scales.shape] != expected or inputs % MXFP4_BLOCK:
        raise UsageError(
            f"{blocks.name} is {list(blocks.shape)} and {scales.name} {list(scales.shape)} in {blocks.path}, MXFP4 of "
            f"{[experts, *rows, inputs]} is {[*expected, MXFP4_BLOCK // 2]} and {expected}: {_belongs(folder)}"
        )
    other = next((each for each in (blocks, scales) if each.dtype != "U8"), None)
    if other is not None:
        raise UsageError(f"{other.name} is {other.dtype} in {other.path}, codes and scales of MXFP4 are U8")
    return StoredWeights(blocks, (experts, *others, inputs), Form.MXFP4, scales)


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


def _dtype_notes(dtypes: Mapping[str | Form, int], dtype: Dtype) -> Iterator[str]:
    for name, count in dtypes.items():
        if isinstance(name, Form):
            yield f"{count:,} tensors are {name.value}"
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
