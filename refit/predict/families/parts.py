"""Fused logical tensors taken apart, for destinations that quantise their parts by themselves.

Megatron's `linear_qkv` has the rows of `q_proj`, `k_proj` and `v_proj` by query group. Where a head's rows are no whole
blocks, a block of `q_proj` is not in one piece there. Both sides of the refit then hold three tensors in its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from refit.config.quantisation import Quantisation
from refit.plan.box import Box, coalesce
from refit.plan.quantised import Grid
from refit.plan.sharding import Sharding, TensorSharding, TensorSpec
from refit.predict.families.names import Block, NamedModel, NamedTensor, Piece


@dataclass(frozen=True, slots=True)
class PartTensor:
    """`tensor` has rows of a fused tensor: of each piece, `held` is a box of `tensor` and `box` one of the fused."""

    tensor: TensorSpec
    pieces: tuple[Piece, ...]

    def pieces_of(self, box: Box) -> Iterator[Piece]:
        """What `box` of the fused tensor has of this one, piece by piece."""
        for piece in self.pieces:
            found = piece.box.intersect(box)
            if found is not None:
                moved = zip(found.offsets, piece.box.offsets, piece.held.offsets, strict=True)
                offsets = tuple(offset - begin + held for offset, begin, held in moved)
                yield Piece(Box(offsets, found.extents), piece.key, found)


Parts = Mapping[str, tuple[PartTensor, ...]]
"""Key of a fused tensor -> the tensors that take its place."""


def parts_of(model: NamedModel, quantisation: Quantisation) -> Parts:
    """The fused tensors of `model` that `quantisation` names and whose parts it cannot quantise in place."""
    found: dict[str, tuple[PartTensor, ...]] = {}
    for block in model.blocks:
        members: dict[str, list[NamedTensor]] = defaultdict(list)
        for tensor in block.tensors:
            members[block.key_prefix + tensor.row.key].append(tensor)
        for key, tensors in members.items():
            shape = model.logical[key].shape
            if any(each.row.interleaved or each.row.others for each in tensors):
                continue  # refused where it would be quantised
            if quantisation.quantises(key, shape) and any(
                _is_cut(each, Grid(shape, quantisation.format)) for each in tensors
            ):
                found[key] = tuple(
                    PartTensor(TensorSpec(_key(key, each), each.shape, each.dtype), each.pieces) for each in tensors
                )
    return found


def _is_cut(tensor: NamedTensor, grid: Grid) -> bool:
    """Whether blocks of `tensor` lie in several pieces of the fused tensor, whose blocks are `grid`."""
    return len(tensor.pieces) > 1 and not all(grid.is_aligned(piece.box) for piece in tensor.pieces)


def _key(fused: str, part: NamedTensor) -> str:
    """`self_attention.query.linear_qkv.weight`: the last words stay, by which `--fp8-keep-bf16` finds the tensor."""
    rest, name, weight = fused.rsplit(".", 2)
    return f"{rest}.{part.row.part.name.lower()}.{name}.{weight}"


def model_in_parts(model: NamedModel, parts: Parts) -> NamedModel:
    """`model` with `parts` as its logical tensors. Layers of a kind share one `tensors` object, as before."""
    if not parts:
        return model
    known: dict[tuple[int, frozenset[str]], tuple[NamedTensor, ...]] = {}
    blocks = []
    for block in model.blocks:
        apart = frozenset(tensor.row.key for tensor in block.tensors if block.key_prefix + tensor.row.key in parts)
        if (id(block.tensors), apart) not in known:
            known[id(block.tensors), apart] = tuple(_apart(tensor, apart) for tensor in block.tensors)
        blocks.append(Block(block.prefix, block.key_prefix, known[id(block.tensors), apart]))
    logical: dict[str, TensorSpec] = {}
    for key, tensor in model.logical.items():
        logical |= {each.tensor.key: each.tensor for each in parts[key]} if key in parts else {key: tensor}
    return NamedModel(model.family, tuple(blocks), logical)


def _apart(tensor: NamedTensor, apart: frozenset[str]) -> NamedTensor:
    """`tensor` as the only one of its logical tensor, if that is one of `apart`."""
    if tensor.row.key not in apart:
        return tensor
    whole, key = Box.whole(tensor.shape), _key(tensor.row.key, tensor)
    return replace(tensor, row=replace(tensor.row, key=key), pieces=(Piece(whole, key, whole),))


def sharding_in_parts(sharding: Sharding, parts: Parts) -> Sharding:
    """The same memory, with `parts` in place of their fused tensors."""
    if not parts:
        return sharding
    tensors: dict[str, TensorSpec] = {}
    by_key: dict[str, TensorSharding] = {}
    known: dict[tuple[int, tuple[Piece, ...]], TensorSharding] = {}
    for key, tensor in sharding.tensors.items():
        held = sharding.by_key[key]
        if key not in parts:
            tensors[key], by_key[key] = tensor, held
            continue
        for part in parts[key]:
            kind = (id(held), part.pieces)
            if kind not in known:
                known[kind] = TensorSharding.of((rank, _held(held, rank, part)) for rank in sharding.ranks)
            tensors[part.tensor.key], by_key[part.tensor.key] = part.tensor, known[kind]
    return Sharding(sharding.ranks, tensors, by_key)


def _held(held: TensorSharding, rank: int, part: PartTensor) -> tuple[Box, ...]:
    return coalesce(piece.held for box in held.boxes_of(rank) for piece in part.pieces_of(box))
