"""The tensors of one model under their Hugging Face names, and the logical tensor and box behind any of their boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from refit.config.layout import Layout
from refit.config.shape import Dtype, LayerKind, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.predict import megatron
from refit.predict.families.releases import kept_in_float32
from refit.predict.families.tables import (
    EXPERT_BIAS_KEY,
    PROJECTION_BIAS,
    QKV_BIAS,
    QUERY_NORM,
    SHARED,
    SHARED_GATE,
    SINKS,
    Family,
    Part,
    Release,
    Row,
    closest_family,
    families,
)

DELTA_NETS = "--experimental-attention-variant gated_delta_net"


@dataclass(frozen=True, slots=True)
class LogicalBox:
    """A box of the logical tensor `key`. `axes` as of the `Piece` that it is from."""

    key: str
    box: Box
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """`held`, a box of a Hugging Face tensor, and the `box` of the logical tensor `key` with the same elements.

    A single expert's `held` lacks the logical tensor's leading dim, which is 1 in `box`. `axes` are the dims of `held`
    in the order in which `box` has them, those of a single element left out; None where `held` has the same.
    """

    held: Box
    key: str
    box: Box
    axes: tuple[int, ...] | None = None

    def logical(self, part: Box) -> LogicalBox:
        """The logical box of `part`, a box within `held`."""
        dims = self.axes or tuple(range(len(part.extents)))
        moved = [part.offsets[dim] - self.held.offsets[dim] for dim in dims]
        last = zip(moved, self.box.offsets[-len(dims) :], strict=True)
        offsets = (*self.box.offsets[: -len(dims)], *(offset + box for offset, box in last))
        extents = (*self.box.extents[: -len(dims)], *(part.extents[dim] for dim in dims))
        return LogicalBox(self.key, Box(offsets, extents), self.axes)


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of a Hugging Face model. Its pieces are a partition of it in row order; `row` is its entry.

    Boxes are those of `shape`. `stored` is another shape of the same memory, in which the tensor lies: `[..., 2 F]`
    where gate and up rows are interleaved, of `shape` `[..., F, 2]`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    row: Row
    pieces: tuple[Piece, ...]
    stored: tuple[int, ...] | None = None

    def pieces_of(self, held: Box) -> Iterator[tuple[Box, LogicalBox]]:
        """`held`, a box of this tensor, as parts of one logical box each."""
        for piece in self.pieces:
            part = piece.held.intersect(held)
            if part is not None:
                yield part, piece.logical(part)


@dataclass(frozen=True, slots=True)
class Block:
    """A layer, or what is outside the layers: the prefixes of its names in both spaces, and its tensors below them.

    Layers of a kind share one `tensors` object.
    """

    prefix: str
    key_prefix: str
    tensors: tuple[NamedTensor, ...]


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model under Hugging Face names. `logical` are its logical tensors by key, the vocabulary without padding."""

    family: Family
    blocks: tuple[Block, ...]
    logical: Mapping[str, TensorSpec]


def named_model(
    shape: ModelShape,
    dtype: Dtype,
    *,
    single_experts: bool = False,
    release: Release | None = None,
    in_vllm: bool = False,
) -> NamedModel:
    """The tensors of `shape` under the names of its family.

    `single_experts` names each routed expert's tensors, and all others, as published checkpoints do; else all experts
    are one tensor. Parameters that this `release` of transformers keeps in float32 are float32, or those that vLLM
    does where the model is `in_vllm`; others have `dtype`.
    Raises UsageError as `check_names`.
    """
    family = check_names(shape)
    experts = family.single_experts if single_experts else family.experts
    if in_vllm:
        experts = family.engine_experts or experts
    logical = _logical_tensors(shape, dtype)
    kept = kept_in_float32(family, release) if release is not None else ()
    if in_vllm:
        kept = tuple(row for row in (*family.linear, *family.routed) if row.float32_in_vllm)
    for row in kept:
        logical |= {key: replace(each, dtype="float32") for key, each in logical.items() if key.endswith(f".{row.key}")}
    layers, rest = _by_layer(logical)
    resolved: dict[LayerKind, tuple[NamedTensor, ...]] = {}
    keys: dict[LayerKind, Set[str]] = {}
    blocks = [Block("", "", _resolve(family, family.model, rest, shape, "", ""))]
    for number, tensors in layers.items():
        kind = shape.kinds[number]
        prefix, key_prefix = f"model.layers.{number}.", f"decoder.layers.{number}."
        if kind not in resolved:
            rows = (*family.rows_of(kind), *(experts if kind.routed else ()))
            resolved[kind] = _resolve(family, rows, tensors, shape, prefix, key_prefix)
            keys[kind] = tensors.keys()
            if single_experts:
                published = (replace(each, name=family.published_name(each.name)) for each in resolved[kind])
                resolved[kind] = tuple(published)
        assert tensors.keys() == keys[kind], f"layers of a kind differ: {tensors.keys() ^ keys[kind]}"
        blocks.append(Block(prefix, key_prefix, resolved[kind]))
    return NamedModel(family, tuple(blocks), logical)


def check_names(shape: ModelShape) -> Family:
    """The family that has names for the tensors of `shape`. Raises UsageError, with what differs, where none has."""
    family, experts = closest_family(shape), shape.experts
    has_shared, has_bias = family.has(SHARED), family.has(EXPERT_BIAS_KEY)
    has_norms, needs_norms = family.has(QUERY_NORM), shape.mla is not None or family.needs(QUERY_NORM)
    has_sinks, biased = family.has(SINKS), family.has(PROJECTION_BIAS)
    has_nets, has_shared_gate = bool(family.linear), family.has(SHARED_GATE)
    misfit = family.misfit(shape)
    shared = experts is not None and experts.shared_ffn_hidden_size is not None
    bias = experts is not None and experts.expert_bias
    shared_gate = experts is not None and experts.shared_gate
    width = experts.ffn_hidden_size if experts is not None else shape.ffn_hidden_size
    found = [
        (shape.position_embedding_type != "rope", "give --position-embedding-type rope"),
        (shape.normalization != "RMSNorm", "give --normalization RMSNorm"),
        (not shape.swiglu, "give --swiglu"),
        (has_sinks and not shape.quick_geglu, "give --quick-geglu"),
        (shape.quick_geglu and not has_sinks, "leave --quick-geglu out"),
        (shape.attention_sinks and not has_sinks, "leave --softmax-type out"),
        (shape.add_bias_linear and not biased, "give --disable-bias-linear"),
        (biased and not shape.add_bias_linear, "leave --disable-bias-linear out"),
        (family.needs(QKV_BIAS) and not (biased or shape.add_qkv_bias), "give --add-qkv-bias"),
        (shape.add_qkv_bias and not family.has(QKV_BIAS), "leave --add-qkv-bias out"),
        (needs_norms and not shape.qk_layernorm, "give --qk-layernorm"),
        (shape.qk_layernorm and not has_norms, "leave --qk-layernorm out"),
        (family.norms_over_heads and not shape.qk_norm_over_heads, "give --qk-norm-over-heads"),
        (has_norms and shape.qk_norm_over_heads and not family.norms_over_heads, "leave --qk-norm-over-heads out"),
        (shape.mtp_num_layers > 0, "give --mtp-num-layers 0"),
        (bool(family.experts) and experts is None, "give --num-experts 8"),
        (experts is not None and experts.latent_size is not None, "leave --moe-latent-size out"),
        (has_shared and not shared, f"give --moe-shared-expert-intermediate-size {width}"),
        (shared and not has_shared, "leave --moe-shared-expert-intermediate-size out"),
        (has_shared_gate and not shared_gate, "give --moe-shared-expert-gate"),
        (shared_gate and not has_shared_gate, "leave --moe-shared-expert-gate out"),
        (has_nets and shape.delta_net is None, f"give {DELTA_NETS}"),
        (shape.delta_net is not None and not has_nets, f"leave {DELTA_NETS} out"),
        (has_nets and not shape.attention_output_gate, "give --attention-output-gate"),
        (shape.attention_output_gate and not has_nets, "leave --attention-output-gate out"),
        (has_bias and not bias, "give --moe-router-enable-expert-bias"),
        (bias and not has_bias, "leave --moe-router-enable-expert-bias out"),
        (misfit is not None, misfit or ""),
    ]
    differences = [remedy for differs, remedy in found if differs]
    if differences:
        if any(remedy.startswith("leave") for remedy in differences):  # no flag takes back what a preset states
            differences.append(f"or choose --model tiny_{family.model_type}")
        raise UsageError(
            "the model is none of those with names of Hugging Face, "
            f"{', '.join(each.model_type for each in families())}: for {family.model_type} {', '.join(differences)}"
        )
    return family


def _logical_tensors(shape: ModelShape, dtype: Dtype) -> dict[str, TensorSpec]:
    """What Megatron holds on one rank. Hugging Face models have no padding rows."""
    alone = SideSpec(Layout(tp=1, ep=1, etp=1, pp=1, world_size=1), dtype=dtype)
    return dict(megatron.predict(replace(shape, make_vocab_size_divisible_by=1), alone).tensors)


def _by_layer(logical: Mapping[str, TensorSpec]) -> tuple[dict[int, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    """Decoder layer -> its tensors by name below the layer's prefix; and the tensors outside the decoder layers."""
    layers: dict[int, dict[str, TensorSpec]] = defaultdict(dict)
    rest: dict[str, TensorSpec] = {}
    for key, tensor in logical.items():
        words = key.split(".", 3)
        if words[:2] == ["decoder", "layers"]:
            layers[int(words[2])][words[3]] = tensor
        else:
            rest[key] = tensor
    return layers, rest


def _resolve(
    family: Family,
    rows: Iterable[Row],
    logical: Mapping[str, TensorSpec],
    shape: ModelShape,
    prefix: str,
    key_prefix: str,
) -> tuple[NamedTensor, ...]:
    rows = [row for row in rows if row.key in logical or not row.optional]
    named = {key for row in rows for key in row.keys}
    other = [key_prefix + key for key in named if key not in logical]
    other += [key_prefix + key for key in logical if key not in named]
    assert not other, f"check_names lets a model pass with other tensors than {family.model_type}: {other}"
    return tuple(tensor for row in rows for tensor in _tensors(row, [logical[key] for key in row.keys], shape))


def _tensors(row: Row, members: Sequence[TensorSpec], shape: ModelShape) -> Iterator[NamedTensor]:
    """The tensors of one row: one, or one per routed expert."""
    logical = members[0]
    whole = Box.whole(logical.shape)
    if len(members) > 1:
        yield _of_several(row, members, shape)
        return
    if row.transposed or row.interleaved:
        yield _rearranged(row, logical)
        return
    if "{expert}" not in row.name:
        yield _tensor(row, row.name, logical, whole, shape)
        return
    for expert in range(logical.shape[0]):
        yield _tensor(row, row.name.format(expert=expert), logical, whole.narrow(0, expert, expert + 1), shape)


def _tensor(row: Row, name: str, logical: TensorSpec, within: Box, shape: ModelShape) -> NamedTensor:
    """The tensor `name`, which has the rows `row.part` of `within`."""
    dim = 1 if row.routed else 0
    begin, pieces = 0, []
    dropped = 1 if "{expert}" in row.name else 0
    for first, last in _intervals(row.part, logical.shape[dim], shape):
        box = within.narrow(dim, first, last)
        held = Box.whole(box.extents).narrow(dim, 0, last - first)
        offsets = tuple(begin if axis == dim else 0 for axis in range(len(box.extents)))
        pieces.append(Piece(Box(offsets[dropped:], held.extents[dropped:]), row.key, box))
        begin += last - first
    extents = list(within.extents)
    extents[dim] = begin
    return NamedTensor(name, tuple(extents[dropped:]), logical.dtype, row, tuple(pieces))


def _of_several(row: Row, members: Sequence[TensorSpec], shape: ModelShape) -> NamedTensor:
    """The tensor with the rows of all `members`: key head by key head, or one member behind another."""
    assert shape.delta_net is not None, "only delta nets have such tensors"
    turns = shape.delta_net.num_key_heads if row.part is Part.IN_TURN else 1
    pieces, begin = list[Piece](), 0
    for turn in range(turns):
        for key, member in zip(row.keys, members, strict=True):
            size = member.shape[0] // turns
            box = Box.whole(member.shape).narrow(0, turn * size, (turn + 1) * size)
            pieces.append(Piece(Box((begin, *box.offsets[1:]), box.extents), key, box))
            begin += size
    return NamedTensor(row.name, (begin, *members[0].shape[1:]), members[0].dtype, row, tuple(pieces))


def _rearranged(row: Row, logical: TensorSpec) -> NamedTensor:
    """The tensor of a row whose memory has the dims of `logical` `[experts, rows, ...]` in another order.

    Interleaved rows are two dims, `[rows / 2, 2]`, so that gate and up are boxes: gate is 0 of the second.
    """
    dims = list(range(len(logical.shape)))
    if row.transposed:
        dims[1], dims[2] = 2, 1
    extents = [logical.shape[dim] for dim in dims]
    axes = tuple(dims.index(dim) for dim in range(len(dims)))
    whole = Box.whole(logical.shape)
    if not row.interleaved:
        piece = Piece(Box.whole(tuple(extents)), row.key, whole, axes)
        return NamedTensor(row.name, tuple(extents), logical.dtype, row, (piece,))
    at, half = axes[1], logical.shape[1] // 2
    shape = (*extents[:at], half, 2, *extents[at + 1 :])
    axes = tuple(axis + (axis > at) for axis in axes)
    pieces = tuple(
        Piece(
            Box.whole(shape).narrow(at + 1, number, number + 1),
            row.key,
            whole.narrow(1, number * half, (number + 1) * half),
            axes,
        )
        for number in (0, 1)
    )
    return NamedTensor(row.name, shape, logical.dtype, row, pieces, tuple(extents))


def _intervals(part: Part, num_rows: int, shape: ModelShape) -> list[tuple[int, int]]:
    """The rows of the logical tensor that a part has: intervals [first, last) in the order of the part."""
    if part is Part.WHOLE:
        return [(0, num_rows)]
    if part in (Part.GATE, Part.UP):
        half = num_rows // 2
        return [(0, half)] if part is Part.GATE else [(half, num_rows)]
    size, queries = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    before = queries * (1 + shape.attention_output_gate)
    heads = {
        Part.QUERY: [(0, queries)],
        Part.QUERY_AND_GATE: [(at, at + 1) for head in range(queries) for at in (head, queries + head)],
        Part.KEY: [(before, before + 1)],
        Part.VALUE: [(before + 1, before + 2)],
    }[part]
    starts = range(0, num_rows, (before + 2) * size)
    return [(start + first * size, start + last * size) for start in starts for first, last in heads]
