"""What every rank of vLLM's engines holds, predicted from the flags: no model, no vLLM, no torch.

Names, shapes and cuts are those of vLLM's own model classes: `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`,
`DeepseekV3ForCausalLM` (model_executor/models), whose linears are `QKVParallelLinear`, `MergedColumnParallelLinear`,
`RowParallelLinear` and `ReplicatedLinear` (layers/linear.py), `VocabParallelEmbedding` and `FusedMoE`. A parameter
joins tensors of the family's table (`FUSED`); each is cut before they are joined.

An engine's ranks are [dp, pp, tp], tp fastest (`initialize_model_parallel` in distributed/parallel_state.py). The
experts of a stage are divided over its ranks [dp, tp] (`FusedMoEParallelConfig.make`). Engines follow one another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec, VllmOptions
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.sharding import Sharding, TensorSharding
from refit.predict.families.config_json import config_values
from refit.predict.families.names import Block, NamedModel, NamedTensor, Piece, named_model
from refit.predict.families.tables import Part
from refit.predict.megatron import Split
from refit.predict.placement import Slots, placed_layers

VOCAB_PADDING = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` of layers/vocab_parallel_embedding.py. TP has to divide what comes of it."""

FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "self_attn.fused_qkv_a_proj.weight": ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.shared_experts.gate_up_proj.weight": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "mlp.experts.w13_weight": ("mlp.experts.gate_up_proj",),
    "mlp.experts.w2_weight": ("mlp.experts.down_proj",),
}
"""A parameter of vLLM and the tensors that it joins along their rows. All others keep the family's names."""


@dataclass(frozen=True, slots=True)
class Place:
    """The coordinates of a rank in its engine. `expert` is its number among the ranks of its stage."""

    stage: int
    dp: int
    tp: int
    expert: int


@dataclass(frozen=True, slots=True)
class Engine:
    """The sizes of one engine. `expert_tp` slices every expert where `ep` is 1, and is 1 where experts are whole."""

    tp: int
    dp: int
    pp: int
    ep: int
    expert_tp: int

    @classmethod
    def of(cls, side: SideSpec) -> Engine:
        """Raises UsageError, with both numbers, where the layout is none of such engines."""
        layout, options = side.layout, side.vllm or VllmOptions()
        shared = layout.tp * options.data_parallel_size
        engine = cls(layout.tp, options.data_parallel_size, layout.pp, layout.ep, shared // layout.ep)
        ranks = engine.num_ranks * options.replicas
        if layout.vpp > 1:
            raise UsageError(f"vLLM has 1 model chunk per rank, not {layout.vpp}: leave virtual pipeline stages out")
        if layout.world_size != ranks:
            raise UsageError(
                f"{layout.world_size} ranks are no {options.replicas} engines of {engine.num_ranks}: give {ranks}"
            )
        if layout.ep not in (1, shared):
            raise UsageError(
                f"EP size {layout.ep} of an engine with TP x DP = {shared}: give EP {shared} (whole experts) or 1 "
                "(slices)"
            )
        return engine

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def replicates_shared_experts(self) -> bool:
        """vLLM's `use_sequence_parallel_moe` (config/parallel.py): each TP rank has other tokens in its MoE layers."""
        return self.ep > 1 and self.tp > 1 and self.dp > 1

    def place(self, local: int) -> Place:
        """The coordinates of rank number `local` of all engines together."""
        rest, tp = divmod(local % self.num_ranks, self.tp)
        dp, stage = divmod(rest, self.pp)
        return Place(stage, dp, tp, dp * self.tp + tp)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter on one rank, its name below its block's prefix, and the pieces of logical tensors that fill it.

    `held` of a piece is a box of this parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


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
        self.shape, self.engine = shape, Engine.of(side)
        self.model = padded_model(shape, side.dtype)
        options = side.vllm or VllmOptions()
        self.placed: Mapping[int, Slots] = {}
        if shape.experts is not None:
            num_redundant = options.num_redundant_experts
            self.placed = placed_layers(shape.experts, options.placement, num_redundant, self.engine.ep)
        self.stages = stage_layers(side.layout, shape.num_layers)
        self._known: dict[object, tuple[Parameter, ...]] = {}

    def blocks_of(self, place: Place) -> Iterator[RankBlock]:
        """What the rank at `place` holds, in the order of the model."""
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
        """Embedding on the first stage; norm and output layer on the last, which may be the embedding (tied)."""
        is_last = place.stage == self.engine.pp - 1
        stays = {"model.embed_tokens.weight": place.stage == 0 or (is_last and self.shape.tied_embeddings)}
        return tuple(one for one in self._parameters(block, place, None) if stays.get(one.name, is_last))

    def _parameters(self, block: Block, place: Place, slots: tuple[int, ...] | None) -> tuple[Parameter, ...]:
        """The parameters of a block: those of the routed experts in `slots`, or all others."""
        kind = (id(block.tensors), place.tp, slots, place.expert if slots and self.engine.expert_tp > 1 else None)
        if kind not in self._known:
            named = {tensor.name: tensor for tensor in block.tensors if tensor.row.routed is (slots is not None)}
            self._known[kind] = tuple(self._joined(name, members, place, slots) for name, members in _fused(named))
        return self._known[kind]

    def _joined(
        self, name: str, members: Sequence[NamedTensor], place: Place, slots: tuple[int, ...] | None
    ) -> Parameter:
        parts = [[(tensor, box) for tensor in members for box in self._cut(tensor, place)]]
        if slots is not None:
            parts = [[(tensor, box.narrow(0, expert, expert + 1)) for tensor, box in parts[0]] for expert in slots]
        dim, pieces = int(slots is not None), list[Piece]()
        for slot, row in enumerate(parts):
            begin = 0
            for tensor, box in row:
                at = tuple(begin if axis == dim else 0 for axis in range(len(box.extents)))
                pieces += _pieces(tensor, box, (slot, *at[1:]) if dim else at)
                begin += box.extents[dim]
        extents = list(self._cut(members[0], place)[0].extents)
        extents[dim] = sum(box.extents[dim] for tensor in members for box in self._cut(tensor, place))
        if slots is not None:
            extents[0] = len(slots)
        return Parameter(name, tuple(extents), members[0].dtype, tuple(pieces))

    def _cut(self, tensor: NamedTensor, place: Place) -> tuple[Box, ...]:
        """The boxes of a tensor on one rank, all experts of a routed one: gate and up are cut apart."""
        row, whole, parts, part = tensor.row, Box.whole(tensor.shape), self.engine.tp, place.tp
        if row.routed:
            parts, part = self.engine.expert_tp, place.expert if self.engine.expert_tp > 1 else 0
        replicated = self.engine.replicates_shared_experts and ".shared_experts." in row.name
        if row.split is Split.REPLICATED or replicated or parts == 1:
            return (whole,)
        if row.split is Split.GATED:
            return tuple(_part(whole, int(row.routed), 2 * parts, half * parts + part) for half in (0, 1))
        if row.part in (Part.KEY, Part.VALUE) and self.shape.num_query_groups < parts:
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
        yield Piece(Box(offsets, part.extents), logical.key, logical.box)


def _part(box: Box, dim: int, parts: int, part: int) -> Box:
    size = box.extents[dim] // parts
    return box.narrow(dim, part * size, (part + 1) * size)


def padded_model(shape: ModelShape, dtype: Dtype) -> NamedModel:
    """The model's tensors, the vocabulary padded as vLLM pads it."""
    return named_model(replace(shape, vocab_size=padded_vocab_size(shape)), dtype)


def padded_vocab_size(shape: ModelShape) -> int:
    return math.ceil(shape.vocab_size / VOCAB_PADDING) * VOCAB_PADDING


def stage_layers(layout: Layout, num_layers: int) -> tuple[range, ...]:
    """The layers of each pipeline stage: as given, or by vLLM's `get_pp_indices` (distributed/utils.py).

    What PP does not divide goes to the stages before the last one, one layer each.
    """
    if layout.first_stage_layers is not None or layout.last_stage_layers is not None:
        return layout.stage_layers(num_layers)
    size, rest = divmod(num_layers, layout.pp)
    if not size:
        raise UsageError(f"{num_layers} layers are fewer than {layout.pp} pipeline stages: lower PP to {num_layers}")
    sizes = [size] * layout.pp
    for back in range(2, rest + 2):
        sizes[-back] += 1
    starts = [sum(sizes[:stage]) for stage in range(layout.pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def check(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where vLLM has no such model or cannot shard it so; `name` is the side's in the message."""
    engine, experts = _engine(side, name), shape.experts
    divisible = [
        (shape.num_attention_heads, engine.tp, "attention heads", "TP size"),
        (shape.ffn_hidden_size, engine.tp, "FFN hidden size", "TP size"),
        (padded_vocab_size(shape), engine.tp, f"tokens (padded to a multiple of {VOCAB_PADDING})", "TP size"),
    ]
    if shape.mla is None:
        groups = shape.num_query_groups
        larger, smaller = (groups, engine.tp) if groups > engine.tp else (engine.tp, groups)
        texts = ("query groups", "TP size") if groups > engine.tp else ("TP size", "query groups")
        divisible.append((larger, smaller, *texts))
    if experts is not None:
        divisible += [
            (experts.ffn_hidden_size, engine.expert_tp, "expert FFN hidden size", "TP x DP"),
            (experts.shared_ffn_hidden_size or engine.tp, engine.tp, "shared expert FFN hidden size", "TP size"),
        ]
    elif engine.ep > 1:
        raise UsageError(f"{name}: EP size {engine.ep} needs experts: give --num-experts or set EP to 1")
    for number, divisor, what, by in divisible:
        if number % divisor:
            raise UsageError(f"{name}: {number} {what} cannot be divided by {by} {divisor}")
    try:
        config_values(shape)
        for spec in (side, side.rearranged):
            if spec is not None:
                Engines(shape, spec)
        _check_rearranged(shape, side)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _engine(side: SideSpec, name: str) -> Engine:
    try:
        return Engine.of(side)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _check_rearranged(shape: ModelShape, side: SideSpec) -> None:
    """A new placement fills the same memory: every rank has as many experts as before."""
    if side.rearranged is None:
        return
    if shape.experts is None:
        raise UsageError("a model without experts has none to place: leave --rl-inference-expert-placement-next out")
    before, after = (Engines(shape, spec).placed for spec in (side, side.rearranged))
    for layer, slots in before.items():
        sizes = [[len(held) for held in placed] for placed in (slots, after[layer])]
        if sizes[0] != sizes[1]:
            rank = next(rank for rank, pair in enumerate(zip(*sizes, strict=True)) if len(set(pair)) > 1)
            raise UsageError(
                f"layer {layer} has {sizes[0][rank]} slots on EP rank {rank}, the next placement needs "
                f"{sizes[1][rank]}: engines move experts between the slots they have, give as many"
            )


def predict(shape: ModelShape, side: SideSpec) -> Sharding:
    """What every rank of `side` holds, by canonical keys. Raises UsageError as `check` does.

    Layers of one kind, stage and placement share their TensorShardings.
    """
    check(shape, side, "this layout")
    engines = Engines(shape, side)
    places = [engines.engine.place(local) for local in range(side.world_size)]
    held = {place: tuple(engines.blocks_of(place)) for place in dict.fromkeys(places)}
    by_key: dict[str, TensorSharding] = {}
    known: dict[object, dict[str, TensorSharding]] = {}
    for number, block in enumerate(engines.model.blocks):
        parts = {place: _of_block(held[place], block) for place in held}
        for routed in (False, True):
            kind = (id(block.tensors), _stage(engines, number), routed, routed and id(engines.placed.get(number - 1)))
            if kind not in known:
                known[kind] = _shardings(parts, places, side.ranks, routed)
            by_key |= {block.key_prefix + key: sharding for key, sharding in known[kind].items()}
    tensors = engines.model.logical
    return Sharding(tuple(side.ranks), tensors, {key: by_key[key] for key in tensors})


def _stage(engines: Engines, number: int) -> int | None:
    """The stage of block `number`; None for what is outside the layers."""
    return next((stage for stage, layers in enumerate(engines.stages) if number - 1 in layers), None)


def _of_block(blocks: Sequence[RankBlock], block: Block) -> RankBlock | None:
    return next((one for one in blocks if one.block is block), None)


def _shardings(
    parts: Mapping[Place, RankBlock | None], places: Sequence[Place], ranks: range, routed: bool
) -> dict[str, TensorSharding]:
    """Logical tensor of a block, below its prefix -> its sharding: the routed experts', or all others."""
    boxes: dict[str, dict[Place, list[Box]]] = defaultdict(dict)
    for place, block in parts.items():
        for parameter in block.parameters if block is not None else ():
            if parameter.name.startswith("mlp.experts.") is routed:
                for piece in parameter.pieces:
                    boxes[piece.key].setdefault(place, []).append(piece.box)
    found = {}
    for key, by_place in boxes.items():
        merged = {place: coalesce(held) for place, held in by_place.items()}
        pairs = ((rank, merged.get(place, ())) for rank, place in zip(ranks, places, strict=True))
        found[key] = TensorSharding.of(pairs)
    return found
