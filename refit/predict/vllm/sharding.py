"""The sharding of a vLLM side, predicted from the flags: no model, no vLLM, no torch. And whether there is one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from refit.config.flag_names import size_flag
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box, coalesce
from refit.plan.sharding import Sharding, TensorSharding
from refit.predict.families.config_json import config_values
from refit.predict.families.names import Block
from refit.predict.megatron_layout import check_pipeline
from refit.predict.vllm.engine import Engine, Place
from refit.predict.vllm.names import is_experts
from refit.predict.vllm.options import VllmOptions
from refit.predict.vllm.parameters import VOCAB_PADDING, Engines, RankBlock, padded_vocab_size
from refit.predict.vllm.quantised import held_blocks


def check(shape: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where vLLM has no such model or cannot shard it so; `name` is the side's in the message."""
    engine, experts = _engine(side, name), shape.experts
    _check_running(side, name)
    if side.layout.chunk_sizes is not None:
        check_pipeline(shape, side.layout, name)
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
    if shape.delta_net is not None:
        divisible.append((shape.delta_net.num_key_heads, engine.tp, "key heads of delta nets", "TP size"))
    if experts is not None:
        divisible += [
            (experts.ffn_hidden_size, engine.expert_tp, "expert FFN hidden size", "TP x DP"),
            (experts.shared_ffn_hidden_size or engine.tp, engine.tp, "shared expert FFN hidden size", "TP size"),
        ]
    elif engine.ep > 1:
        raise UsageError(f"{name}: EP size {engine.ep} needs experts: give --num-experts, or {size_flag(name, 'ep')} 1")
    for number, divisor, what, by in divisible:
        if number % divisor:
            raise UsageError(f"{name}: {number} {what} cannot be divided by {by} {divisor}")
    if experts is not None and shape.add_bias_linear and engine.expert_tp > 1:
        raise UsageError(
            f"{name}: of the biases of sliced experts only the first of {engine.expert_tp} ranks has any, which is not "
            f"predicted: give {size_flag(name, 'ep')} {engine.expert_tp} (whole experts)"
        )
    try:
        config_values(shape)
        for spec in (side, side.rearranged):
            if spec is not None:
                _check_engines(Engines(shape, spec))
        _check_rearranged(shape, side)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _check_running(side: SideSpec, name: str) -> None:
    """Raise UsageError for what a running engine cannot be asked for: its sizes are those of one `vllm.LLM`."""
    options = side.options_as(VllmOptions)
    if options.engine_python is None:
        if options.engine_sleep:
            raise UsageError(
                f"{name}: --rl-inference-engine-sleep {options.engine_sleep} without an engine that runs: give "
                "--rl-inference-engine-python"
            )
        return
    layout = side.layout
    plain = replace(options, engine_python=None, engine_sleep=0) == VllmOptions()
    if layout.ep > 1:
        raise UsageError(
            f"{name}: EP {layout.ep} in a running vLLM, which 0.32.0 does not do on CPUs: give "
            f"{size_flag(name, 'ep')} 1, or leave --rl-inference-engine-python out"
        )
    is_fp8 = side.quantisation is not None and side.quantisation.dtype != "fp8-block"
    if not plain or layout.pp > 1 or is_fp8:
        raise UsageError(
            f"{name}: a running vLLM is one engine with TP, its experts in order and no MXFP8: leave the "
            "other sizes and settings out, or --rl-inference-engine-python"
        )


def _engine(side: SideSpec, name: str) -> Engine:
    try:
        return Engine.of(side)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _check_engines(engines: Engines) -> None:
    """Raise UsageError where the parameters of a stage cannot be FP8. Ranks of a stage have equal cuts."""
    if engines.quantisation is not None:
        for stage in range(engines.engine.pp):
            for _ in held_blocks(engines, Place(stage, 0, 0, 0)):
                pass


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
    """What every rank of `side` holds, unquantised, by canonical keys. Raises UsageError as `check` does.

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
            if is_experts(parameter.name.rpartition(".")[0]) is routed:
                for piece in parameter.pieces:
                    boxes[piece.key].setdefault(place, []).append(piece.box)
    found = {}
    for key, by_place in boxes.items():
        merged = {place: coalesce(held) for place, held in by_place.items()}
        pairs = ((rank, merged.get(place, ())) for rank, place in zip(ranks, places, strict=True))
        found[key] = TensorSharding.of(pairs)
    return found
