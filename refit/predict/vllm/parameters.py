"""Which parameters every rank of vLLM's engines has, and which boxes of logical tensors fill them.

Names, shapes and cuts are those of vLLM's own model classes: `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`,
`DeepseekV3ForCausalLM` (model_executor/models), whose linears are `QKVParallelLinear`, `MergedColumnParallelLinear`,
`RowParallelLinear` and `ReplicatedLinear` (layers/linear.py), `VocabParallelEmbedding` and `FusedMoE`. A parameter
joins tensors of the family's table (`FUSED`); each is cut before they are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.plan.box import Box
from refit.predict.expert_slots import Slots, placed_layers
from refit.predict.families.names import Block, NamedModel, NamedTensor, Piece, named_model
from refit.predict.families.parts import Parts, model_in_parts, parts_of
from refit.predict.families.tables import KEY_NORM, SHARED, Part
from refit.predict.megatron import Split
from refit.predict.vllm.engine import Engine, Place, stage_layers
from refit.predict.vllm.names import EXPERTS
from refit.predict.vllm.options import VllmOptions

VOCAB_PADDING = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` of layers/vocab_parallel_embedding.py. TP has to divide what comes of it."""

FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "self_attn.qkv_proj.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "self_attn.fused_qkv_a_proj.weight": ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.shared_experts.gate_up_proj.weight": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "mlp.shared_expert.gate_up_proj.weight": (
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
    ),
    f"{EXPERTS}.w13_weight": ("mlp.experts.gate_up_proj",),
    f"{EXPERTS}.w2_weight": ("mlp.experts.down_proj",),
    f"{EXPERTS}.w13_bias": ("mlp.experts.gate_up_proj_bias",),
    f"{EXPERTS}.w2_bias": ("mlp.experts.down_proj_bias",),
}
"""A parameter of vLLM and the tensors that it joins along their rows. All others keep the family's names. Both
are renamed as published checkpoints have them."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter on one rank, its name below its block's prefix, and the pieces of logical tensors that fill it.

    `held` of a piece is a box of this parameter. `stored` is another shape of the same memory, in which vLLM has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    stored: tuple[int, ...] | None = None

    @property
    def engine_shape(self) -> tuple[int, ...]:
        """Its shape in vLLM."""
        return self.stored or self.shape


@dataclass(frozen=True, slots=True)
class RankBlock:
    """A block of the model on one rank. `slots` are its experts, None in a block without."""

    block: Block
    parameters: tuple[Parameter, ...]
    slots: tuple[int, ...] | None


class Engines:
    """The equal engines of one side: which parameters every rank has. Blocks of a kind are worked out once."""

    def __init__(self, shape: ModelShape, side: SideSpec) -> None:
        """Raises UsageError where an expert placement is none of this model's."""
        assert side.dtype is not None, "flags that describe a model give its dtype"
        self.shape, self.engine, self.quantisation = shape, Engine.of(side), side.quantisation
        model = padded_model(shape, side.dtype)
        self.model = model_in_parts(model, _parts(model, side))
        options = side.options_as(VllmOptions)
        self.placed: Mapping[int, Slots] = {}
        if shape.experts is not None:
            num_redundant = options.num_redundant_experts
            self.placed = placed_layers(shape.experts, options.placement, num_redundant, self.engine.ep)
        self.stages = stage_layers(side.layout, shape.num_layers)
        self._known: dict[object, tuple[Parameter, ...]] = {}

    def blocks_of(self, place: Place) -> Iterator[RankBlock]:
        """What the rank at `place` holds, unquantised, in the order of the model."""
        outer, *layers = self.model.blocks
        yield RankBlock(outer, self._outer(outer, place), None)
        for number in self.stages[place.stage]:
            slots = self.slots(number, place)
            dense = self._parameters(layers[number], place, None)
            routed = self._parameters(layers[number], place, slots) if slots is not None else ()
            yield RankBlock(layers[number], (*dense, *routed), slots)

    def slots(self, layer: int, place: Place) -> tuple[int, ...] | None:
        """The experts of a layer on one rank, in the order of their slots; None in a layer without."""
        placed = self.placed.get(layer)
        return placed[place.expert if self.engine.ep > 1 else 0] if placed is not None else None

    def _outer(self, block: Block, place: Place) -> tuple[Parameter, ...]:
        return tuple(one for one in self._parameters(block, place, None) if self._has_outer(one.name, place))

    def _has_outer(self, name: str, place: Place) -> bool:
        """Embedding on the first stage; norm and output layer on the last, which may be the embedding (tied)."""
        is_last = place.stage == self.engine.pp - 1
        embedding = "model.embed_tokens.weight"
        if name not in (embedding, self.model.family.engine_name(embedding)):
            return is_last
        return place.stage == 0 or (is_last and self.shape.tied_embeddings)

    def outer_cuts(self, block: Block, place: Place) -> Iterator[tuple[NamedTensor, tuple[Box, ...]]]:
        """The tensors outside the layers that the rank at `place` has, and its boxes of each."""
        for tensor in block.tensors:
            if self._has_outer(self.model.family.published_name(tensor.name), place):
                yield tensor, self.cut(tensor, place)

    def _parameters(self, block: Block, place: Place, slots: tuple[int, ...] | None) -> tuple[Parameter, ...]:
        """The parameters of a block: those of the routed experts in `slots`, or all others."""
        kind = (id(block.tensors), place.tp, slots, place.expert if slots and self.engine.expert_tp > 1 else None)
        if kind not in self._known:
            named = {tensor.name: tensor for tensor in block.tensors if tensor.row.routed is (slots is not None)}
            self._known[kind] = tuple(
                self._joined(self.model.family.engine_name(name), members, place, slots)
                for name, members in _fused(named)
            )
        return self._known[kind]

    def _joined(
        self, name: str, members: Sequence[NamedTensor], place: Place, slots: tuple[int, ...] | None
    ) -> Parameter:
        parts = [[(tensor, box) for tensor in members for box in self.cut(tensor, place)]]
        if slots is not None:
            parts = [[(tensor, box.narrow(0, expert, expert + 1)) for tensor, box in parts[0]] for expert in slots]
        dim, pieces = int(slots is not None), list[Piece]()
        for slot, row in enumerate(parts):
            begin = 0
            for tensor, box in row:
                at = tuple(begin if axis == dim else 0 for axis in range(len(box.extents)))
                pieces += _pieces(tensor, box, (slot, *at[1:]) if dim else at)
                begin += box.extents[dim]
        extents = list(self.cut(members[0], place)[0].extents)
        extents[dim] = sum(box.extents[dim] for tensor in members for box in self.cut(tensor, place))
        if slots is not None:
            extents[0] = len(slots)
        stored = None
        if members[0].row.interleaved:  # of gate and up in turn, which are two dims in boxes
            stored = (extents[0], 2 * extents[1], *extents[3:])
        return Parameter(name, tuple(extents), members[0].dtype, tuple(pieces), stored)

    def cut(self, tensor: NamedTensor, place: Place) -> tuple[Box, ...]:
        """The boxes of a tensor on one rank, all experts of a routed one: gate and up, and sections, are cut apart."""
        row, whole, parts, part = tensor.row, Box.whole(tensor.shape), self.engine.tp, place.tp
        if row.routed:
            parts, part = self.engine.expert_tp, place.expert if self.engine.expert_tp > 1 else 0
        replicated = self.engine.replicates_shared_experts and row.key.startswith(f"{SHARED}.")
        if row.split is Split.REPLICATED or replicated or parts == 1:
            return (whole,)
        if row.part is Part.SECTIONS:
            return tuple(_part(piece.held, 0, parts, part) for piece in tensor.pieces)
        if row.split is Split.GATED:
            return tuple(_part(whole, int(row.routed), 2 * parts, half * parts + part) for half in (0, 1))
        if (row.part in (Part.KEY, Part.VALUE) or row.key == KEY_NORM) and self.shape.num_query_groups < parts:
            groups = self.shape.num_query_groups
            return (_part(whole, 0, groups, part // (parts // groups)),)
        return (_part(whole, int(row.routed) + int(row.split is Split.ROW), parts, part),)


def _fused(named: Mapping[str, NamedTensor]) -> Iterator[tuple[str, Sequence[NamedTensor]]]:
    """Each parameter's name and the tensors that it joins."""
    left = dict(named)
    for name, members in FUSED.items():
        if all(member in left for member in members):
            yield name, [left.pop(member) for member in members]
    yield from ((name, [tensor]) for name, tensor in left.items())


def _pieces(tensor: NamedTensor, box: Box, at: tuple[int, ...]) -> Iterator[Piece]:
    """`box` of a tensor, put at offsets `at` of a parameter."""
    for part, logical in tensor.pieces_of(box):
        offsets = tuple(a + begin - first for a, begin, first in zip(at, part.offsets, box.offsets, strict=True))
        yield Piece(Box(offsets, part.extents), logical.key, logical.box, logical.axes)


def _part(box: Box, dim: int, parts: int, part: int) -> Box:
    size = box.extents[dim] // parts
    begin = box.offsets[dim] + part * size
    return box.narrow(dim, begin, begin + size)


def parts(shape: ModelShape, side: SideSpec) -> Parts:
    """The logical tensors that `side` quantises part by part."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    return _parts(padded_model(shape, side.dtype), side)


def _parts(model: NamedModel, side: SideSpec) -> Parts:
    return {} if side.quantisation is None else parts_of(model, side.quantisation)


def padded_model(shape: ModelShape, dtype: Dtype) -> NamedModel:
    """The model's tensors, the vocabulary padded as vLLM pads it."""
    return named_model(replace(shape, vocab_size=padded_vocab_size(shape)), dtype, in_vllm=True)


def padded_vocab_size(shape: ModelShape) -> int:
    return math.ceil(shape.vocab_size / VOCAB_PADDING) * VOCAB_PADDING
