"""What every rank of a Megatron side holds, predicted from the flags: no model, no Megatron, no torch.

`embedding_tensors`, `layer_tensors`, `output_tensors` and `token_prediction_tensors` list a model's tensors and how
each is split. `boxes_of` gives the part of one rank. `predict` combines them, stage by stage. Shapes and splits are
those of Megatron-Core's GPTModel as its `sharded_state_dict()` states them (0.16.1 and 0.19.2).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from refit.config.layout import Coordinates, Layout
from refit.config.shape import DeltaNet, Experts, LatentAttention, LayerKind, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.sharding import ReplicatedShard, Sharding, TensorSharding, TensorSpec
from refit.predict.megatron_layout import check


class Split(Enum):
    """How a matrix `[rows, columns]` (or a bias `[rows]`) is split over the tensor axis, one part per TP rank."""

    REPLICATED = "every rank holds all of it"
    COLUMN = "rows in equal parts (a column-parallel linear, weights being [out, in])"
    GATED = "rows are [gate; up]: an equal part of each half"
    ROW = "columns in equal parts (a row-parallel linear)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its name below the layer's prefix, its shape and how it is split.

    A `routed` tensor is `[num_experts, ...]`. EP splits its experts, and ETP the other dims as `split` says. `dtype`
    None is the side's.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    routed: bool = False
    padded: bool = False
    dtype: str | None = None


def predict(shape: ModelShape, side: SideSpec) -> Sharding:
    """What every rank of `side` holds, by canonical keys (`refit.models.megatron.sharding`).

    Raises UsageError where a tensor cannot be split evenly.
    """
    check(shape, side, "this layout")
    assert side.dtype is not None, "flags that describe a model give its dtype"
    layout, side_dtype = side.layout, side.dtype.value
    stages = [Stage(layout, number) for number in range(layout.pp)]
    first, last, with_words = stages[0], stages[-1], word_embedding_stages(shape, layout)
    tensors: dict[str, TensorSpec] = {}
    by_key: dict[str, TensorSharding] = {}

    def add(key: str, entry: Entry, *holders: Stage) -> None:
        dtype = entry.dtype or side_dtype
        tensors[key] = TensorSpec(key, entry.shape, dtype, stacked=entry.routed, padded=entry.padded)
        by_key[key] = holders[0].tensor_sharding(entry) if len(holders) == 1 else joined(entry, holders)

    for entry in embedding_tensors(shape, layout.tp):
        # Each stage with a word embedding has all of it. Position embeddings are on the first only.
        add(entry.name, entry, *([stages[number] for number in with_words] if entry.padded else [first]))
    kinds = shape.kinds
    tensors_of = {kind: layer_tensors(shape, kind, side.transformer_impl) for kind in dict.fromkeys(kinds)}
    for stage, chunks in zip(stages, layout.chunk_layers(shape.num_layers), strict=True):
        for layer in itertools.chain(*chunks):
            for entry in tensors_of[kinds[layer]]:
                add(f"decoder.layers.{layer}.{entry.name}", entry, stage)
    norm_stage = stages[layout.final_norm_stage(shape.num_layers, shape.mtp_num_layers)]
    for entry in output_tensors(shape, layout.tp):
        add(entry.name, entry, last if entry.padded else norm_stage)
    for depth in range(shape.mtp_num_layers):
        for entry in token_prediction_tensors(shape, tensors_of[kinds[-1]]):
            add(f"mtp.layers.{depth}.{entry.name}", entry, stages[layout.prediction_chunk % layout.pp])
    return Sharding(tuple(layout.ranks), tensors, by_key)


def word_embedding_stages(shape: ModelShape, layout: Layout) -> list[int]:
    """The pipeline stages that hold the word embedding: the first, that of a tied output layer, and that of multi-token
    prediction."""
    stages = {0}
    if shape.tied_embeddings:
        stages.add(layout.pp - 1)
    if shape.mtp_num_layers:
        stages.add(layout.prediction_chunk % layout.pp)
    return sorted(stages)


# --- The tensors of a model -------------------------------------------------------------------------------------


def embedding_tensors(shape: ModelShape, tp: int) -> list[Entry]:
    """On the first stage. A tied word embedding is also the last stage's output layer."""
    words = (shape.padded_vocab_size(tp), shape.hidden_size)
    entries = [Entry("embedding.word_embeddings.weight", words, Split.COLUMN, padded=True)]
    if shape.position_embedding_type == "learned_absolute":
        positions = (shape.max_position_embeddings, shape.hidden_size)
        entries.append(Entry("embedding.position_embeddings.weight", positions, Split.REPLICATED))
    return entries


def output_tensors(shape: ModelShape, tp: int) -> list[Entry]:
    """On the last stage, but for the norm, which Megatron may have on that of the last decoder layer."""
    entries = [*_norm("decoder.final_layernorm", shape.hidden_size, shape)]
    if not shape.tied_embeddings:
        words = (shape.padded_vocab_size(tp), shape.hidden_size)
        entries.append(Entry("output_layer.weight", words, Split.COLUMN, padded=True))
    return entries


def layer_tensors(shape: ModelShape, kind: LayerKind, transformer_impl: str) -> tuple[Entry, ...]:
    """One decoder layer of this kind."""
    entries = [
        *_norm("input_layernorm", shape.hidden_size, shape),
        *_norm("pre_mlp_layernorm", shape.hidden_size, shape),
    ]
    if kind.delta_net and shape.delta_net is not None:
        entries += _gated_delta_net(shape, shape.delta_net)
    elif shape.mla is None:
        entries += _grouped_query_attention(shape)
    else:
        entries += _latent_attention(shape, shape.mla, transformer_impl)
    if kind.routed and shape.experts is not None:
        entries += _mixture_of_experts(shape, shape.experts)
    else:
        entries += _mlp("mlp", shape.hidden_size, shape.ffn_hidden_size, shape)
    return tuple(entries)


def token_prediction_tensors(shape: ModelShape, layer: Iterable[Entry]) -> Iterator[Entry]:
    """One multi-token prediction layer: norms, a projection of [token; hidden state], and a decoder `layer`."""
    hidden = shape.hidden_size
    for norm in ("enorm", "hnorm", "final_layernorm"):
        yield from _norm(norm, hidden, shape)
    yield from _linear("eh_proj", hidden, 2 * hidden, Split.COLUMN)
    for entry in layer:
        yield replace(entry, name=f"transformer_layer.{entry.name}")


def _norm(name: str, size: int, shape: ModelShape) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (size,), Split.REPLICATED)
    if shape.normalization == "LayerNorm":
        yield Entry(f"{name}.bias", (size,), Split.REPLICATED)


def _linear(name: str, rows: int, columns: int, split: Split, bias: bool = False) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (rows, columns), split)
    if bias:
        # The bias of a row-parallel linear is added after the sum over ranks: every rank holds all of it.
        yield Entry(f"{name}.bias", (rows,), Split.REPLICATED if split is Split.ROW else split)


def _grouped_query_attention(shape: ModelShape) -> Iterator[Entry]:
    """Rows of linear_qkv lie group by group, [queries of the group; key; value]: equal parts, whatever TP is. Output
    gates, where there are any, follow a group's queries."""
    heads, size, hidden = shape.num_attention_heads, shape.kv_channels, shape.hidden_size
    rows = (heads * (1 + shape.attention_output_gate) + 2 * shape.num_query_groups) * size
    attention = "self_attention"
    yield from _linear(
        f"{attention}.linear_qkv", rows, hidden, Split.COLUMN, shape.add_bias_linear or shape.add_qkv_bias
    )
    yield from _linear(f"{attention}.linear_proj", hidden, heads * size, Split.ROW, shape.add_bias_linear)
    if shape.attention_sinks:
        yield Entry(f"{attention}.core_attention.softmax_offset", (heads,), Split.COLUMN)
    if shape.qk_norm_over_heads:
        yield Entry(f"{attention}.q_layernorm.weight", (heads * size,), Split.COLUMN)
        yield Entry(f"{attention}.k_layernorm.weight", (shape.num_query_groups * size,), Split.COLUMN)
    elif shape.qk_layernorm:
        yield from _norm(f"{attention}.q_layernorm", size, shape)
        yield from _norm(f"{attention}.k_layernorm", size, shape)


def _latent_attention(shape: ModelShape, mla: LatentAttention, transformer_impl: str) -> Iterator[Entry]:
    """Down projections are split by the local layer spec and replicated by Transformer Engine's."""
    heads, hidden = shape.num_attention_heads, shape.hidden_size
    down = Split.REPLICATED if transformer_impl == "transformer_engine" else Split.COLUMN
    query_rows = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
    attention = "self_attention"
    if mla.q_lora_rank is None:
        yield from _linear(f"{attention}.linear_q_proj", query_rows, hidden, Split.COLUMN)
    else:
        yield from _linear(f"{attention}.linear_q_down_proj", mla.q_lora_rank, hidden, down)
        yield from _linear(f"{attention}.linear_q_up_proj", query_rows, mla.q_lora_rank, Split.COLUMN)
        if shape.qk_layernorm:
            yield from _norm(f"{attention}.q_layernorm", mla.q_lora_rank, shape)
    latent_rows = mla.kv_lora_rank + mla.qk_pos_emb_head_dim
    yield from _linear(f"{attention}.linear_kv_down_proj", latent_rows, hidden, down)
    key_value_rows = heads * (mla.qk_head_dim + mla.v_head_dim)
    yield from _linear(f"{attention}.linear_kv_up_proj", key_value_rows, mla.kv_lora_rank, Split.COLUMN)
    if shape.qk_layernorm:
        yield from _norm(f"{attention}.kv_layernorm", mla.kv_lora_rank, shape)
    yield from _linear(f"{attention}.linear_proj", hidden, heads * mla.v_head_dim, Split.ROW, shape.add_bias_linear)


def _gated_delta_net(shape: ModelShape, net: DeltaNet) -> Iterator[Entry]:
    """Megatron's `in_proj` has the rows of six projections, one behind another, `conv1d` those of three. TP cuts each
    of them, so that each is a tensor here, as in checkpoints."""
    attention, keys, values = "self_attention", net.key_width, net.value_width
    widths = {"query": keys, "key": keys, "value": values}
    others = {"z": values, "beta": net.num_value_heads, "alpha": net.num_value_heads}
    for name, width in {**widths, **others}.items():
        yield from _linear(f"{attention}.{name}.in_proj", width, shape.hidden_size, Split.COLUMN)
    for name, width in widths.items():
        yield Entry(f"{attention}.{name}.conv1d.weight", (width, 1, net.conv_kernel_dim), Split.COLUMN)
    for name in ("dt_bias", "A_log"):
        yield Entry(f"{attention}.{name}", (net.num_value_heads,), Split.COLUMN)
    yield from _norm(f"{attention}.out_norm", net.value_head_dim, shape)
    yield from _linear(f"{attention}.out_proj", shape.hidden_size, values, Split.ROW)


def _mlp(name: str, width: int, ffn: int, shape: ModelShape) -> Iterator[Entry]:
    """An MLP from `width` to `ffn` and back."""
    first = (2 * ffn, Split.GATED) if shape.swiglu else (ffn, Split.COLUMN)
    yield from _linear(f"{name}.linear_fc1", first[0], width, first[1], shape.add_bias_linear)
    yield from _linear(f"{name}.linear_fc2", width, ffn, Split.ROW, shape.add_bias_linear)


def _mixture_of_experts(shape: ModelShape, experts: Experts) -> Iterator[Entry]:
    count, hidden, latent = experts.num_experts, shape.hidden_size, experts.latent_size
    yield Entry("mlp.router.weight", (count, hidden), Split.REPLICATED)
    if shape.add_bias_linear:
        yield Entry("mlp.router.bias", (count,), Split.REPLICATED)
    if experts.expert_bias:
        yield Entry("mlp.router.expert_bias", (count,), Split.REPLICATED, dtype="float32")
    if latent is not None:
        yield from _linear("mlp.fc1_latent_proj", latent, hidden, Split.REPLICATED, shape.add_bias_linear)
        yield from _linear("mlp.fc2_latent_proj", hidden, latent, Split.REPLICATED, shape.add_bias_linear)
    for one in _mlp("mlp.experts.experts", latent or hidden, experts.ffn_hidden_size, shape):
        yield Entry(one.name, (count, *one.shape), one.split, routed=True)
    if experts.shared_ffn_hidden_size is not None:
        yield from _mlp("mlp.shared_experts", hidden, experts.shared_ffn_hidden_size, shape)
        if experts.shared_gate:
            yield Entry("mlp.shared_experts.gate_weight", (1, hidden), Split.REPLICATED)


# --- Which rank holds what ---------------------------------------------------------------------------------------


class Stage:
    """The ranks of one pipeline stage. Layers of a kind have equal shardings: one TensorSharding serves them all."""

    def __init__(self, layout: Layout, number: int) -> None:
        size = layout.world_size // layout.pp
        self.layout = layout
        self.ranks = layout.ranks[number * size : (number + 1) * size]
        self._shardings: dict[tuple[tuple[int, ...], Split, bool], TensorSharding] = {}
        self._replicas: dict[bool, list[Replicas]] = {}

    def tensor_sharding(self, entry: Entry) -> TensorSharding:
        kind = (entry.shape, entry.split, entry.routed)
        if kind not in self._shardings:
            self._shardings[kind] = joined(entry, (self,))
        return self._shardings[kind]

    def replicas(self, routed: bool) -> list[Replicas]:
        """The stage's ranks by the part that each holds of dense or of routed tensors."""
        if routed not in self._replicas:
            found: dict[tuple[int, ...], Replicas] = {}
            for rank in self.ranks:
                at = self.layout.coordinates(rank)
                found.setdefault((at.ep, at.etp) if routed else (at.tp,), Replicas(at, [])).ranks.append(rank)
            self._replicas[routed] = list(found.values())
        return self._replicas[routed]


@dataclass(frozen=True, slots=True)
class Replicas:
    """Ranks that hold the same part, and the coordinates of the first."""

    at: Coordinates
    ranks: list[int]


def joined(entry: Entry, stages: tuple[Stage, ...]) -> TensorSharding:
    """The sharding of a tensor that all `stages` hold."""
    ranks: dict[Box, list[int]] = defaultdict(list)
    for stage in stages:
        for replicas in stage.replicas(entry.routed):
            for box in boxes_of(entry, stage.layout, replicas.at):
                ranks[box] += replicas.ranks
    return TensorSharding(tuple(ReplicatedShard(box, tuple(sorted(holders))) for box, holders in ranks.items()))


def boxes_of(entry: Entry, layout: Layout, at: Coordinates) -> tuple[Box, ...]:
    """What the rank at these coordinates holds of a tensor: two boxes where gate and up do not touch, else one."""
    whole, dim, parts, part = Box.whole(entry.shape), 0, layout.tp, at.tp
    if entry.routed:
        whole = _part(entry, whole, 0, layout.ep, at.ep)
        dim, parts, part = 1, layout.etp, at.etp
    if entry.split is Split.REPLICATED:
        return (whole,)
    if entry.split is Split.GATED:
        gate, up = (_part(entry, whole, dim, 2 * parts, half * parts + part) for half in (0, 1))
        return coalesce([gate, up])
    return (_part(entry, whole, dim + (entry.split is Split.ROW), parts, part),)


def _part(entry: Entry, box: Box, dim: int, parts: int, part: int) -> Box:
    """Part number `part` of `parts` equal ones along `dim`."""
    size, rest = divmod(box.extents[dim], parts)
    if rest:
        raise UsageError(
            f"{entry.name} {list(entry.shape)} cannot be split into {parts} equal parts along dim {dim}: "
            f"give a size that divides {box.extents[dim]}"
        )
    return box.narrow(dim, part * size, (part + 1) * size)
