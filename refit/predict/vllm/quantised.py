"""The parameters of an engine that serves FP8: codes, and beside them scales, under the names that vLLM has for them.

A fused parameter has the scales of its parts one below the other: in vLLM row r of it has row r // 128 of the scales
(`create_fp8_scale_parameter` and `w8a8_triton_block_scaled_mm` in layers/quantization/utils/fp8_utils.py). So each part
must end on a block, the last one at the parameter's end. Experts and linears of one part that TP cuts elsewhere raise
ValueError in vLLM (`create_weights` of `Fp8MoEMethod`, `validate_fp8_block_shape`). Fused linears do not, since
`allow_fp8_block_shape_mismatch` (layers/linear.py), but the offset of a part's scales, `adjust_block_scale_shard`, is
rounded up: they are written beyond the parameter, over another part's, or where other rows read them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from refit.config.quantisation import CODES_DTYPE, Quantisation, scale_key
from refit.errors import UsageError
from refit.plan.quantised import Grid, keep_text, quantised_tensors
from refit.plan.sharding import TensorSpec
from refit.predict.families.names import Piece
from refit.predict.vllm.engine import Engine, Place
from refit.predict.vllm.names import is_experts
from refit.predict.vllm.parameters import FUSED, Engines, Parameter, RankBlock

SCALE_SUFFIXES = {"fp8-block": "_scale_inv", "mxfp8": "_scale"}
"""Behind a parameter's name in the name of its scales: `Fp8LinearMethod` and `Fp8MoEMethod`; the methods of
`ModelOptMxFp8Config` (layers/quantization/modelopt.py), which declare the bytes of E8M0 as uint8."""

BF16_MODULES = ("model.embed_tokens", "lm_head", "mlp.gate", "block_sparse_moe.gate")
"""Modules with weights of two dims that vLLM quantises in no dtype: they are no linears, or built without one."""


def held_blocks(engines: Engines, place: Place) -> Iterator[RankBlock]:
    """What the rank at `place` has in memory: its blocks, with codes and scales in place of the weights that are FP8.

    Raises UsageError, with both numbers, where a cut or a fused part does not end on a block, and where vLLM would
    have to quantise a part of a module only.
    """
    quantisation = engines.quantisation
    if quantisation is None:
        yield from engines.blocks_of(place)
        return
    known: dict[tuple[int, bool], tuple[Parameter, ...]] = {}
    for block in engines.blocks_of(place):
        held: list[Parameter] = []
        modules = _quantised_modules(block, engines.model.logical, quantisation)
        for parameter in block.parameters:
            is_matrix = len(parameter.shape) > 1 and not parameter.name.endswith("_bias")
            kind = (id(parameter), is_matrix and _module(parameter) in modules)
            if kind not in known:
                known[kind] = (parameter,)
                if kind[1]:
                    known[kind] = _codes_and_scales(parameter, block, engines, quantisation)
            held += known[kind]
        yield replace(block, parameters=tuple(held))


def held_tensors(engines: Engines) -> Mapping[str, TensorSpec]:
    """The logical tensors that the parameters of `held_blocks` are filled with."""
    logical, quantisation = engines.model.logical, engines.quantisation
    return logical if quantisation is None else quantised_tensors(logical, quantisation)


def _module(parameter: Parameter) -> str:
    """`self_attn.qkv_proj`, `mlp.experts.routed_experts`: what vLLM quantises as a whole."""
    return parameter.name.rpartition(".")[0]


def _quantised_modules(block: RankBlock, logical: Mapping[str, TensorSpec], quantisation: Quantisation) -> set[str]:
    """The modules of a block that are FP8."""
    members: dict[str, dict[str, bool]] = defaultdict(dict)
    for parameter in block.parameters:
        for key in _keys(parameter.pieces, block):
            if len(logical[key].shape) > 1 and not key.endswith(".bias"):
                members[_module(parameter)][key] = quantisation.quantises(key, logical[key].shape)
    for module, chosen in members.items():
        quantised = next((key for key, is_quantised in chosen.items() if is_quantised), None)
        kept = next((key for key, is_quantised in chosen.items() if not is_quantised), None)
        if quantised is not None and kept is not None:
            raise UsageError(
                f"vLLM quantises {block.block.prefix}{module} as a whole, --fp8-keep-bf16 keeps {kept} of it and not "
                f"{quantised}: {keep_text([quantised], quantisation)}"
            )
        if quantised is not None and module in BF16_MODULES:
            raise UsageError(
                f"vLLM holds {block.block.prefix}{module} in BF16 only: {keep_text([quantised], quantisation)}"
            )
    return {module for module, chosen in members.items() if any(chosen.values())}


def _keys(pieces: Iterable[Piece], block: RankBlock) -> list[str]:
    return [block.block.key_prefix + key for key in dict.fromkeys(piece.key for piece in pieces)]


def _codes_and_scales(
    parameter: Parameter, block: RankBlock, engines: Engines, quantisation: Quantisation
) -> tuple[Parameter, Parameter]:
    form = quantisation.format
    mixed = next((block.block.key_prefix + piece.key for piece in parameter.pieces if piece.axes is not None), None)
    if mixed is not None:
        raise UsageError(
            f"{block.block.prefix}{parameter.name} has gate and up rows in turn, blocks of {quantisation.dtype} would "
            f"have rows of both: {keep_text([mixed], quantisation)}"
        )
    own = Grid(parameter.shape, form)
    scales: list[Piece] = []
    for piece in parameter.pieces:
        key = block.block.key_prefix + piece.key
        grid = Grid(engines.model.logical[key].shape, form)
        for box, within in ((piece.box, grid), (piece.held, own)):
            if not within.is_aligned(box):
                dim, step = within.unaligned(box)
                raise UsageError(
                    f"{box.extents[dim]} {('rows', 'columns')[dim]} of {key} in {block.block.prefix}{parameter.name} "
                    f"cannot be divided into blocks of {step} ({quantisation.dtype}), "
                    f"{_rule(parameter, quantisation)}: {_other_sizes(engines.engine, parameter)}, or "
                    f"{keep_text([key], quantisation)}"
                )
        scales.append(Piece(own.scales(piece.held), scale_key(piece.key), grid.scales(piece.box)))
    name = parameter.name + SCALE_SUFFIXES[quantisation.dtype]
    codes = replace(parameter, dtype=CODES_DTYPE)
    return codes, Parameter(name, own.scale_shape, form.scale_dtype, tuple(scales))


def _rule(parameter: Parameter, quantisation: Quantisation) -> str:
    """Why vLLM cannot hold a part that does not end on a block."""
    rows = quantisation.format.rows
    if rows == 1:
        return "as vLLM's MXFP8 layers demand"
    if is_experts(_module(parameter)):
        return "as vLLM's Fp8MoEMethod demands"
    if parameter.name in FUSED:
        return f"and row r of vLLM's fused tensors has scale row r // {rows}"
    return "as vLLM's validate_fp8_block_shape demands"


def _other_sizes(engine: Engine, parameter: Parameter) -> str:
    if is_experts(_module(parameter)) and engine.expert_tp > 1:
        return f"give EP {engine.expert_tp} (whole experts)"
    return "choose other sizes"
