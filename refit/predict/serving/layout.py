"""How a side's ranks serve: engines, attention replicas, stages, which experts are where, and what a rank holds.

Tensors are counted, one of each kind and stage, instead of being listed layer by layer and rank by rank as the sharding
of a side is (`predict`): a search looks at hundreds of sides. A test compares the bytes of both, rank by rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from refit.config.quantisation import CODES_DTYPE, Quantisation
from refit.config.shape import LayerKind, ModelShape
from refit.config.side import SideSpec
from refit.plan.box import Box
from refit.plan.quantised import Grid
from refit.plan.sharding import ITEMSIZE, TensorSpec
from refit.predict import megatron
from refit.predict.expert_slots import Slots
from refit.predict.vllm.engine import Place, stage_layers
from refit.predict.vllm.parameters import Engines


@dataclass(frozen=True, slots=True)
class Counted:
    """What a rank has of equal tensors, `times` as often as `boxes` of `tensor`. `routed`: of one expert in a slot."""

    tensor: TensorSpec
    boxes: tuple[Box, ...]
    times: int
    routed: bool = False

    @property
    def elements(self) -> int:
        return self.times * sum(box.volume for box in self.boxes)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.tensor.dtype]

    def quantised(self, quantisation: Quantisation | None) -> Iterator[Counted]:
        """Its codes and scales; itself where it stays as it is. Raises ValueError where it does not lie on blocks."""
        if quantisation is None or not quantisation.quantises(self.tensor.key, self.tensor.shape):
            yield self
            return
        grid = Grid(self.tensor.shape, quantisation.format)
        whole = not quantisation.format.whole or self.tensor.shape[-1] % quantisation.format.columns == 0
        if self.tensor.padded or not whole or not all(grid.is_aligned(box) for box in self.boxes):
            raise ValueError(self.tensor.key)
        yield replace(self, tensor=replace(self.tensor, dtype=CODES_DTYPE))
        scales = TensorSpec(f"{self.tensor.key}_scale", (1,), quantisation.format.scale_dtype)
        yield replace(self, tensor=scales, boxes=tuple(grid.scales(box) for box in self.boxes))


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage: the global numbers of its layers, its ranks `[dp, tp]`, tp fastest, and what each of them has.

    Of routed experts `held` has those of one slot, in all its layers.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    held: tuple[Counted, ...]

    def bytes_of(self, routed: bool) -> int:
        return sum(each.nbytes for each in self.held if each.routed is routed)


@dataclass(frozen=True)
class Served:
    """The sizes of one of `engines` equal engines, on the ranks of `stages`. `placed` are the experts by layer and EP
    rank.

    The first `ep * etp` ranks of a stage hold each expert, `etp` of them a slice of the same ones, and so do the next.
    `scatters`: each TP rank has other tokens in the layers with experts, and all of their shared experts.
    """

    engines: int
    tp: int
    dp: int
    ep: int
    etp: int
    stages: tuple[Stage, ...]
    placed: Mapping[int, Slots]
    scatters: bool = False

    @property
    def replicas(self) -> int:
        """Attention replicas of all engines: each decodes sequences of its own."""
        return self.engines * self.dp

    @property
    def span(self) -> int:
        """The ranks that hold each expert once."""
        return self.ep * self.etp

    @property
    def crosses_replicas(self) -> bool:
        """Whether tokens have to leave the TP group that has them, to reach their experts."""
        return self.span > self.tp

    @cached_property
    def bytes_by_rank(self) -> list[int]:
        """Bytes of weights on each rank, engine by engine."""
        found: dict[int, int] = {}
        for stage in self.stages:
            routed = [layer for layer in stage.layers if layer in self.placed]
            dense, slot = stage.bytes_of(routed=False), stage.bytes_of(routed=True) // max(1, len(routed))
            slots = [sum(len(self.placed[layer][ep]) for layer in routed) for ep in range(self.ep)]
            for place, rank in enumerate(stage.ranks):
                found[rank] = dense + slot * slots[place // self.etp % self.ep]
        return [found[rank] for rank in sorted(found)] * self.engines

    def dtypes(self) -> tuple[str, ...]:
        """Those that matrix products are in: `bf16`, `fp8`."""
        fp8 = any(each.tensor.dtype == CODES_DTYPE for stage in self.stages for each in stage.held)
        return ("bf16", "fp8") if fp8 else ("bf16",)


def of_megatron(shape: ModelShape, side: SideSpec) -> Served:
    """Ranks are [pp, dp, tp], and the same ranks [pp, edp, ep, etp] (`refit.config.layout`).

    Raises ValueError where a quantised tensor is not cut between blocks.
    """
    layout = side.layout
    size = layout.world_size // layout.pp
    stages = tuple(
        Stage(
            tuple(itertools.chain(*chunks)),
            tuple(layout.ranks[number * size : (number + 1) * size]),
            _quantised(_of_megatron_stage(shape, side, number, [*itertools.chain(*chunks)]), side),
        )
        for number, chunks in enumerate(layout.chunk_layers(shape.num_layers))
    )
    placed: dict[int, Slots] = {}
    if shape.experts is not None:
        count = shape.experts.num_experts // layout.ep
        slots = tuple(tuple(range(ep * count, (ep + 1) * count)) for ep in range(layout.ep))
        placed = {layer: slots for layer, routed in enumerate(shape.experts.layers) if routed}
    return Served(1, layout.tp, layout.dp, layout.ep, layout.etp, stages, placed)


def _of_megatron_stage(shape: ModelShape, side: SideSpec, number: int, layers: list[int]) -> Iterator[Counted]:
    assert side.dtype is not None, "flags that describe a model give its dtype"
    layout, dtype = side.layout, side.dtype.value
    at = layout.coordinates(layout.ranks[number * (layout.world_size // layout.pp)])

    def counted(prefix: str, entry: megatron.Entry, times: int = 1) -> Counted:
        tensor = TensorSpec(f"{prefix}{entry.name}", entry.shape, entry.dtype or dtype, entry.routed, entry.padded)
        boxes = megatron.boxes_of(entry, layout, at)
        if entry.routed:
            boxes = tuple(box.narrow(0, box.offsets[0], box.offsets[0] + 1) for box in boxes)
        return Counted(tensor, boxes, times, entry.routed)

    with_words = megatron.word_embedding_stages(shape, layout)
    for entry in megatron.embedding_tensors(shape, layout.tp):
        if number in with_words if entry.padded else number == 0:
            yield counted("", entry)
    kinds: dict[LayerKind, list[int]] = {}
    for layer in layers:
        kinds.setdefault(shape.kinds[layer], []).append(layer)
    for kind, alike in kinds.items():
        for entry in megatron.layer_tensors(shape, kind, side.transformer_impl):
            yield counted(f"decoder.layers.{alike[0]}.", entry, len(alike))
    norm_stage = layout.final_norm_stage(shape.num_layers, shape.mtp_num_layers)
    for entry in megatron.output_tensors(shape, layout.tp):
        if number == (layout.pp - 1 if entry.padded else norm_stage):
            yield counted("", entry)
    if shape.mtp_num_layers and number == layout.prediction_chunk % layout.pp:
        last = megatron.layer_tensors(shape, shape.kinds[-1], side.transformer_impl)
        for entry in megatron.token_prediction_tensors(shape, last):
            # Its experts are no slots of a layer that decodes: all those of the rank are counted together.
            one = counted("mtp.layers.0.", entry, shape.mtp_num_layers)
            count = shape.experts.num_experts // layout.ep if entry.routed and shape.experts is not None else 1
            yield replace(one, times=one.times * count, routed=False)


def of_vllm(shape: ModelShape, side: SideSpec) -> Served:
    """Ranks are [engine, dp, pp, tp]; the experts of a stage are divided over its ranks [dp, tp].

    Raises ValueError where a quantised tensor is not cut between blocks.
    """
    engines, first = Engines(shape, side), side.layout.first_rank
    engine = engines.engine
    ranks = range(first, first + engine.num_ranks)
    stages = tuple(
        Stage(
            tuple(layers),
            tuple(rank for rank in ranks if engine.place(rank - first).stage == number),
            _quantised(_of_vllm_stage(engines, number, layers), side),
        )
        for number, layers in enumerate(stage_layers(side.layout, shape.num_layers))
    )
    number = side.world_size // engine.num_ranks
    return Served(
        number,
        engine.tp,
        engine.dp,
        engine.ep,
        engine.expert_tp,
        stages,
        engines.placed,
        engine.replicates_shared_experts,
    )


def _of_vllm_stage(engines: Engines, number: int, layers: range) -> Iterator[Counted]:
    logical, place = engines.model.logical, Place(number, 0, 0, 0)
    outer, *blocks = engines.model.blocks
    for tensor, boxes in engines.outer_cuts(outer, place):
        yield from (Counted(logical[piece.key], (piece.box,), 1) for box in boxes for _, piece in tensor.pieces_of(box))
    kinds: dict[int, list[int]] = {}
    for layer in layers:
        kinds.setdefault(id(blocks[layer].tensors), []).append(layer)
    for alike in kinds.values():
        block = blocks[alike[0]]
        for tensor in block.tensors:
            for box in engines.cut(tensor, place):
                one = box.narrow(0, 0, 1) if tensor.row.routed else box
                for _, piece in tensor.pieces_of(one):
                    held = logical[block.key_prefix + piece.key]
                    yield Counted(held, (piece.box,), len(alike), tensor.row.routed)


def _quantised(held: Iterator[Counted], side: SideSpec) -> tuple[Counted, ...]:
    return tuple(itertools.chain.from_iterable(each.quantised(side.quantisation) for each in held))
