"""The parameters of engines that serve FP8: shapes and names known from vLLM, scales at their codes, refused cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.config.quantisation import BLOCK_FORMATS, Quantisation
from refit.config.shape import LatentAttention, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.quantised import Grid
from refit.predict.sides import check_side, predict_side
from refit.predict.vllm.engine import Place
from refit.predict.vllm.parameters import Engines, Parameter
from refit.predict.vllm.quantised import SCALE_SUFFIXES, held_blocks
from tests.predict.families.strategies import fitting
from tests.predict.test_vllm import FLAGS, engine_models, preset, side, sides

BLOCK, MX = Quantisation("fp8-block", "amax"), Quantisation("mxfp8", "ceil")


def quantised(quantisation: Quantisation, *args: int, **options: Any) -> SideSpec:
    return replace(side(*args, **options), quantisation=quantisation)


def parameters(shape: ModelShape, spec: SideSpec, layer: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype, of a layer on the first rank."""
    blocks = held_blocks(Engines(shape, spec), Place(0, 0, 0, 0))
    held = next(block for block in blocks if block.block.prefix == f"model.layers.{layer}.")
    return {parameter.name: (parameter.shape, parameter.dtype) for parameter in held.parameters}


def test_every_dtype_has_a_name_for_its_scales() -> None:
    assert SCALE_SUFFIXES.keys() == BLOCK_FORMATS.keys()


def test_kimi_k2_in_block_fp8_on_tp8_with_whole_experts() -> None:
    """Scales of `ceil(rows / 128)` x `ceil(columns / 128)`, as `create_fp8_scale_parameter` and `Fp8MoEMethod` make."""
    codes, scales = "float8_e4m3fn", "float32"
    found = parameters(preset("kimi_k2"), quantised(BLOCK, 8, ep=True), 1)
    assert {name: held for name, held in found.items() if held[1] != "bfloat16"} == {
        "self_attn.fused_qkv_a_proj.weight": ((1536 + 512 + 64, 7168), codes),
        "self_attn.fused_qkv_a_proj.weight_scale_inv": ((12 + 5, 56), scales),
        "self_attn.q_b_proj.weight": ((8 * 192, 1536), codes),
        "self_attn.q_b_proj.weight_scale_inv": ((12, 12), scales),
        "self_attn.kv_b_proj.weight": ((8 * 256, 512), codes),
        "self_attn.kv_b_proj.weight_scale_inv": ((16, 4), scales),
        "self_attn.o_proj.weight": ((7168, 8 * 128), codes),
        "self_attn.o_proj.weight_scale_inv": ((56, 8), scales),
        "mlp.gate.e_score_correction_bias": ((384,), "float32"),
        "mlp.shared_experts.gate_up_proj.weight": ((2 * 2048 // 8, 7168), codes),
        "mlp.shared_experts.gate_up_proj.weight_scale_inv": ((4, 56), scales),
        "mlp.shared_experts.down_proj.weight": ((7168, 2048 // 8), codes),
        "mlp.shared_experts.down_proj.weight_scale_inv": ((56, 2), scales),
        "mlp.experts.routed_experts.w13_weight": ((48, 2 * 2048, 7168), codes),
        "mlp.experts.routed_experts.w13_weight_scale_inv": ((48, 32, 56), scales),
        "mlp.experts.routed_experts.w2_weight": ((48, 7168, 2048), codes),
        "mlp.experts.routed_experts.w2_weight_scale_inv": ((48, 56, 16), scales),
    }
    assert found["mlp.gate.weight"] == ((384, 7168), "bfloat16")


def test_a_delta_net_in_block_fp8_on_tp4() -> None:
    """What vLLM has no FP8 for stays: its rates, with 16 rows on a rank, and its convolution."""
    found = parameters(preset("qwen3_next_80b_a3b"), quantised(BLOCK, 4, ep=True), 0)
    assert {name: held for name, held in found.items() if name.startswith("linear_attn")} == {
        "linear_attn.in_proj_qkvz.weight": ((3072, 2048), "float8_e4m3fn"),
        "linear_attn.in_proj_qkvz.weight_scale_inv": ((24, 16), "float32"),
        "linear_attn.in_proj_ba.weight": ((16, 2048), "bfloat16"),
        "linear_attn.conv1d.weight": ((2048, 1, 4), "bfloat16"),
        "linear_attn.dt_bias": ((8,), "bfloat16"),
        "linear_attn.A_log": ((8,), "float32"),
        "linear_attn.norm.weight": ((128,), "bfloat16"),
        "linear_attn.out_proj.weight": ((2048, 1024), "float8_e4m3fn"),
        "linear_attn.out_proj.weight_scale_inv": ((16, 8), "float32"),
    }
    assert found["mlp.shared_expert_gate.weight"] == ((1, 2048), "bfloat16")


def test_mxfp8_has_scales_of_its_own_name_and_no_grid_over_rows() -> None:
    found = parameters(preset("qwen3_235b_a22b"), quantised(MX, 8), 0)
    assert found["self_attn.qkv_proj.weight_scale"] == (((8 + 1 + 1) * 128, 4096 // 32), "float8_e8m0fnu")
    assert found["mlp.experts.routed_experts.w2_weight_scale"] == ((128, 4096, 1536 // 8 // 32), "float8_e8m0fnu")


# --- Scales are at their codes ---------------------------------------------------------------------------------------


def wide(shape: ModelShape) -> ModelShape:
    """`shape` with sizes that lie on every grid, but for latent down projections, which may end in a smaller block."""
    experts, mla = shape.experts, shape.mla
    if experts is not None:
        shared = experts.shared_ffn_hidden_size
        experts = replace(
            experts,
            ffn_hidden_size=128 * experts.ffn_hidden_size,
            shared_ffn_hidden_size=shared and 128 * shared,
        )
    if mla is not None:
        rank = None if mla.q_lora_rank is None else 128
        mla = LatentAttention(rank, 96, qk_head_dim=64, qk_pos_emb_head_dim=64, v_head_dim=64)
        shape = replace(shape, num_attention_heads=4, num_query_groups=4)
    if shape.delta_net is not None:
        shape = replace(shape, delta_net=replace(shape.delta_net, key_head_dim=128, value_head_dim=128))
    widened = replace(
        shape, hidden_size=160, ffn_hidden_size=128 * shape.ffn_hidden_size, kv_channels=128, experts=experts, mla=mla
    )
    return fitting(widened)


@st.composite
def wide_engines(draw: st.DrawFn) -> tuple[ModelShape, SideSpec]:
    """As `wide`, and heads of half a block, or of one and a half, of which each rank has two or none."""
    shape = wide(draw(engine_models()))
    spec = draw(sides(shape))
    if shape.mla is None and shape.num_query_groups % (2 * spec.layout.tp) == 0:
        shape = fitting(replace(shape, kv_channels=draw(st.sampled_from([64, 128, 192]))))
    return shape, spec


def scaled_by_place(codes: Parameter, scales: Parameter, quantisation: Quantisation) -> None:
    """Every scale is filled once, with the scale of the logical block whose codes are at its place."""
    form = quantisation.format
    steps = Grid(codes.shape, form).steps
    assert scales.shape == tuple(-(-size // step) for size, step in zip(codes.shape, steps, strict=True))
    filled = np.zeros(scales.shape, np.int64)
    for code, scale in zip(codes.pieces, scales.pieces, strict=True):
        assert scale.key == f"{code.key}_scale_inv"
        filled[tuple(slice(a, b) for a, b in zip(scale.held.offsets, scale.held.ends, strict=True))] += 1
        for mine, its in ((code.held, scale.held), (code.box, scale.box)):
            assert its.offsets == tuple(offset // step for offset, step in zip(mine.offsets, steps, strict=True))
            assert all(offset % step == 0 for offset, step in zip(mine.offsets, steps, strict=True))
        assert scale.held.extents == scale.box.extents
    assert (filled == 1).all(), scales.name


@given(st.data())
@settings(max_examples=30)
def test_scales_are_those_of_the_codes_at_their_place_and_bytes_are_as_predicted(data: st.DataObject) -> None:
    quantisation = data.draw(st.sampled_from([BLOCK, MX]))
    shape, spec = data.draw(wide_engines())
    if shape.attention_sinks:  # whose experts have gate and up rows in turn
        quantisation = replace(quantisation, kept=(*quantisation.kept, "experts"))
    spec = replace(spec, quantisation=quantisation)
    engines = Engines(shape, spec)
    suffix = SCALE_SUFFIXES[quantisation.dtype]
    predicted = predict_side(shape, spec)
    itemsize = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}
    for rank in spec.ranks:
        allocated = 0
        for block in held_blocks(engines, engines.engine.place(rank - spec.layout.first_rank)):
            held = {parameter.name: parameter for parameter in block.parameters}
            allocated += sum(Box.whole(each.shape).volume * itemsize[each.dtype] for each in held.values())
            for name, parameter in held.items():
                if parameter.dtype == "float8_e4m3fn":
                    scaled_by_place(parameter, held[name + suffix], quantisation)
        assert allocated == predicted.bytes_per_rank[rank]


# --- What vLLM takes -------------------------------------------------------------------------------------------------


def finds_its_scales(rows: Sequence[int], tp: int, rank: int, replicas: Sequence[int]) -> bool:
    """Whether vLLM gives every row of a fused tensor the scale of its block in the checkpoint.

    `rows` are those of its parts on a rank; `replicas` as many ranks have the same ones. By the arithmetic of
    `adjust_block_scale_shard` and `load_qkv_weight`, and of the kernel, which reads scale row `row // 128`.
    """
    held: list[tuple[int, int] | None] = [None] * -(-sum(rows) // 128)
    begins = [sum(rows[:number]) for number in range(len(rows))]
    for number, (begin, size) in enumerate(zip(begins, rows, strict=True)):
        first, num_scales = -(-begin // 128), -(-size // 128)
        if first + num_scales > len(held):
            return False
        part = rank // replicas[number]
        num_loaded = -(-size * (tp // replicas[number]) // 128)
        for scale in range(num_scales):
            if part * num_scales + scale >= num_loaded:
                return False
            held[first + scale] = (number, part * num_scales + scale)
    return all(
        held[(begin + row) // 128] == (number, (rank // replicas[number] * size + row) // 128)
        for number, (begin, size) in enumerate(zip(begins, rows, strict=True))
        for row in range(size)
    )


def refusal(shape: ModelShape, spec: SideSpec) -> str | None:
    try:
        check_side(shape, spec, "destination")
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300)
def test_dense_models_are_taken_exactly_where_every_row_finds_its_scale(data: st.DataObject) -> None:
    tp, groups = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4, 8]))
    heads = groups * data.draw(st.sampled_from([4, 6]))
    size, ffn = data.draw(st.sampled_from([16, 32, 64, 96, 128, 192])), 64 * tp * data.draw(st.integers(1, 6))
    shape = replace(
        preset("tiny_qwen3"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=size,
        ffn_hidden_size=ffn,
        num_layers=1,
    )
    replicas = max(1, tp // groups)
    key = max(1, groups // tp) * size
    columns = (heads * size // tp, ffn // tp)
    taken = all(tp == 1 or each % 128 == 0 for each in columns) and all(
        finds_its_scales([heads * size // tp, key, key], tp, rank, [1, replicas, replicas])
        and finds_its_scales([ffn // tp, ffn // tp], tp, rank, [1, 1])
        for rank in range(tp)
    )
    assert (refusal(shape, quantised(BLOCK, tp)) is None) == taken


# --- What vLLM refuses -----------------------------------------------------------------------------------------------

KIMI = ["--model=kimi_k2", "--expert-model-parallel-size=32"]
QWEN = ["--model=qwen3_235b_a22b", "--expert-model-parallel-size=1"]
TP, EP = "--rl-inference-tensor-model-parallel-size", "--rl-inference-expert-model-parallel-size"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*KIMI, f"{TP}=64"], r"destination: 288 rows of \S*linear_fc1.weight in \S*gate_up_proj.weight cannot be"),
        (
            [*QWEN, f"{TP}=8"],
            r"192 rows of \S*experts.linear_fc1.weight in .*w13_weight .* 128 .* Fp8MoEMethod .*: give EP 8 \(whole",
        ),
        (
            ["--model=tiny_qwen3", f"{TP}=2"],
            r"64 rows of \S*key.linear_qkv.weight in \S*qkv_proj.weight cannot be .* 128 .* scale row r // 128:",
        ),
        (
            ["--model=tiny_deepseek_v3", "--q-lora-rank=128", f"{TP}=4", "--ffn-hidden-size=1024"],
            r"\d+ rows of \S*linear_q_up_proj.weight in \S*q_b_proj.weight .* vLLM's validate_fp8_block_shape demands",
        ),
        (
            ["--model=tiny_qwen3", "--kv-channels=128", "--ffn-hidden-size=192"],
            r"192 rows of \S*linear_fc1.weight in \S*gate_up_proj.weight .*--fp8-keep-bf16 \S*,linear_fc1\)",
        ),
        (
            ["--model=tiny_qwen3_next", "--moe-shared-expert-intermediate-size=256"],
            r"64 rows of \S*query.in_proj.weight in \S*in_proj_qkvz.weight .*--fp8-keep-bf16 \S*,in_proj\)",
        ),
        (["--model=tiny_deepseek_v3"], r"96 rows of \S*linear_q_down_proj.weight in \S*fused_qkv_a_proj.weight"),
        (
            [*KIMI, "--fp8-keep-bf16=embedding,output,router,linear_q_down_proj"],
            r"vLLM quantises \S*fused_qkv_a_proj as a whole, \S* keeps \S*linear_q_down_proj.weight of it and not",
        ),
        (
            [*KIMI, "--fp8-keep-bf16=embedding,output,router,experts.linear_fc2"],
            "vLLM quantises model.layers.1.mlp.experts.routed_experts as a whole, .*: keep it in BF16 \\(--fp8",
        ),
        (
            [*KIMI, "--fp8-keep-bf16=embedding,output"],
            "vLLM holds model.layers.1.mlp.gate in BF16 only: keep it in BF16",
        ),
    ],
)
def test_cuts_and_parts_that_vllm_refuses_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        parse([*FLAGS, "--rl-inference-dtype=fp8-block", *flags])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        [*KIMI, f"{TP}=16"],
        [*QWEN, f"{TP}=4"],
        [*QWEN, f"{TP}=8", f"{EP}=8"],
        ["--model=tiny_qwen3"],
        ["--model=tiny_qwen3", "--kv-channels=64", f"{TP}=2"],
        [*QWEN, "--kv-channels=64", f"{TP}=2"],
    ],
)
def test_cuts_on_the_grid_are_taken(flags: list[str]) -> None:
    parse([*FLAGS, "--rl-inference-dtype=fp8-block", *flags])


def test_a_layer_can_be_kept_as_it_is() -> None:
    argv = [*FLAGS, *KIMI, "--rl-inference-dtype=fp8-block", "--fp8-keep-bf16=embedding,output,router,layers.3."]
    scenario = parse(argv).scenario
    assert scenario.model is not None
    third, fourth = (parameters(scenario.model, scenario.destination, layer) for layer in (3, 4))
    assert third["mlp.experts.routed_experts.w13_weight"][1] == "bfloat16"
    assert not any(name.endswith("_scale_inv") for name in third)
    assert fourth["mlp.experts.routed_experts.w13_weight"][1] == "float8_e4m3fn"
