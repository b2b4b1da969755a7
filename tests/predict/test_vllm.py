"""The prediction of vLLM's engines: shapes known from vLLM, pieces that fill every parameter once, refused sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.placement import ExpertPlacement
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.planner import plan_refit
from refit.predict import megatron
from refit.predict.expert_map import expert_maps
from refit.predict.vllm.engine import Place, stage_layers
from refit.predict.vllm.options import VllmOptions
from refit.predict.vllm.parameters import Engines, padded_vocab_size
from refit.predict.vllm.sharding import predict
from tests.predict.families.strategies import fitting, models
from tests.predict.placements import placements

FLAGS = ["--dry-run", "--rl-inference-format=vllm"]


def side(
    tp: int = 1, dp: int = 1, pp: int = 1, *, ep: bool = False, replicas: int = 1, first_rank: int = 0, **options: Any
) -> SideSpec:
    sizes = Layout(tp, tp * dp if ep else 1, 1, pp, tp * dp * pp * replicas, first_rank)
    return SideSpec(sizes, format="vllm", dtype=Dtype.BF16, options=VllmOptions(dp, replicas, **options))


def shapes(shape: ModelShape, spec: SideSpec, place: Place, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    blocks = (block for block in Engines(shape, spec).blocks_of(place) if block.block.prefix == prefix)
    return {parameter.name: parameter.shape for parameter in next(blocks).parameters}


def preset(name: str) -> ModelShape:
    shape = parse(["--dry-run", f"--model={name}", "--expert-model-parallel-size=1"]).scenario.model
    assert shape is not None
    return shape


def test_shapes_of_kimi_k2_on_tp8_with_whole_experts() -> None:
    """As `DeepseekV3ForCausalLM` has them: 64 heads of 128 + 64, ranks 1536 and 512, 384 experts of width 2048."""
    found = shapes(preset("kimi_k2"), side(8, ep=True), Place(0, 0, 0, 0), 1)
    assert found == {
        "self_attn.fused_qkv_a_proj.weight": (1536 + 512 + 64, 7168),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (8 * 192, 1536),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (8 * 256, 512),
        "self_attn.o_proj.weight": (7168, 8 * 128),
        "input_layernorm.weight": (7168,),
        "post_attention_layernorm.weight": (7168,),
        "mlp.gate.weight": (384, 7168),
        "mlp.gate.e_score_correction_bias": (384,),
        "mlp.shared_experts.gate_up_proj.weight": (2 * 2048 // 8, 7168),
        "mlp.shared_experts.down_proj.weight": (7168, 2048 // 8),
        "mlp.experts.routed_experts.w13_weight": (48, 2 * 2048, 7168),
        "mlp.experts.routed_experts.w2_weight": (48, 7168, 2048),
    }


def test_shapes_of_qwen3_moe_where_tp_exceeds_the_kv_heads() -> None:
    """4 groups of 16 heads on TP 8: each key and value head is on two ranks. Sliced experts."""
    found = shapes(preset("qwen3_235b_a22b"), side(8), Place(0, 0, 5, 5), 0)
    assert found["self_attn.qkv_proj.weight"] == ((8 + 1 + 1) * 128, 4096)
    assert found["mlp.experts.routed_experts.w13_weight"] == (128, 2 * 1536 // 8, 4096)
    assert found["mlp.experts.routed_experts.w2_weight"] == (128, 4096, 1536 // 8)


def test_shared_experts_are_whole_where_moe_layers_are_sequence_parallel() -> None:
    found = shapes(preset("kimi_k2"), side(2, 4, ep=True), Place(0, 1, 1, 3), 1)
    assert found["mlp.shared_experts.gate_up_proj.weight"] == (2 * 2048, 7168)
    assert found["self_attn.q_b_proj.weight"] == (32 * 192, 1536)
    assert found["mlp.experts.routed_experts.w13_weight"] == (48, 4096, 7168)


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"), [(61, 2, [31, 30]), (61, 4, [15, 15, 16, 15]), (8, 4, [2] * 4), (7, 4, [2, 2, 2, 1])]
)
def test_stages_are_vllms(layers: int, pp: int, sizes: list[int]) -> None:
    """The first two are in vLLM's documents; 7 on 4 by its rule: the last stage gets no layer more."""
    assert [len(stage) for stage in stage_layers(side(pp=pp).layout, layers)] == sizes


@st.composite
def engine_models(draw: st.DrawFn) -> ModelShape:
    """A model whose sizes TP 2, and TP x DP up to 6 for experts, divide; query groups may be fewer than TP."""
    shape = draw(models())
    heads = 2 * shape.num_attention_heads
    groups = shape.num_query_groups if shape.num_query_groups != 3 else 6
    experts = shape.experts
    if experts is not None:
        shared = experts.shared_ffn_hidden_size
        ffn, wide = 12 * experts.ffn_hidden_size, None if shared is None else 12 * shared
        count = experts.num_experts + 3
        experts = replace(experts, num_experts=count, ffn_hidden_size=ffn, shared_ffn_hidden_size=wide)
    latent = shape.mla is not None
    ffn = 2 * shape.ffn_hidden_size
    net = shape.delta_net
    if net is not None:
        net = replace(net, num_key_heads=2 * net.num_key_heads, num_value_heads=2 * net.num_value_heads)
    changed = replace(
        shape,
        num_attention_heads=heads,
        num_query_groups=heads if latent else groups,
        ffn_hidden_size=ffn,
        experts=experts,
        delta_net=net,
    )
    return fitting(changed)


@st.composite
def sides(draw: st.DrawFn, shape: ModelShape) -> SideSpec:
    """An engine that `shape` can be sharded for, its experts anywhere."""
    experts = shape.experts
    tp, dp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    pp, replicas = draw(st.integers(1, shape.num_layers)), draw(st.integers(1, 2))
    biased = shape.add_bias_linear  # whose experts are whole
    if experts is not None and biased and tp * dp > experts.num_experts:
        tp, dp = 1, 1
    sliced = not biased and draw(st.integers(0, 3)) == 0
    if experts is None or tp * dp == 1 or tp * dp > experts.num_experts or sliced:
        return side(tp, dp, pp, replicas=replicas)
    strategies = st.sampled_from([ExpertPlacement(), ExpertPlacement("round_robin")])
    placement = draw(placements(experts.num_experts, sum(experts.layers), tp * dp) | strategies)
    return side(tp, dp, pp, ep=True, replicas=replicas, placement=placement)


@given(st.data())
@settings(max_examples=60)
def test_pieces_fill_every_parameter_once_and_every_expert_has_its_slot(data: st.DataObject) -> None:
    shape = data.draw(engine_models())
    spec = data.draw(sides(shape))
    engines = Engines(shape, spec)
    for local in range(engines.engine.num_ranks):
        for block in engines.blocks_of(engines.engine.place(local)):
            for parameter in block.parameters:
                filled = np.zeros(parameter.shape, np.int64)
                for piece in parameter.pieces:
                    assert piece.held.volume == piece.box.volume
                    filled[tuple(slice(a, b) for a, b in zip(piece.held.offsets, piece.held.ends, strict=True))] += 1
                    if block.slots is not None and parameter.name.startswith("mlp.experts."):
                        assert piece.box.offsets[0] == block.slots[piece.held.offsets[0]]
                assert (filled == 1).all(), parameter.name


@given(st.data())
@settings(max_examples=40)
def test_any_engine_is_planned_from_a_megatron_source(data: st.DataObject) -> None:
    """The plan proves itself: each element of each copy of each expert is written once."""
    shape = data.draw(engine_models())
    spec = data.draw(sides(shape))
    source = SideSpec(Layout(1, 1, 1, 1, 1, first_rank=spec.world_size), dtype=Dtype.BF16)
    predicted = predict(shape, spec)
    plan_refit(megatron.predict(shape, source), predicted)
    held = sum(predicted.bytes_per_rank.values())
    engines = Engines(shape, spec)
    places = [engines.engine.place(local) for local in range(spec.world_size)]
    itemsize = {"bfloat16": 2, "float32": 4}
    allocated = sum(
        int(np.prod(one.shape)) * itemsize[one.dtype]
        for place in places
        for block in engines.blocks_of(place)
        for one in block.parameters
    )
    assert held == allocated


def test_layers_share_geometry_but_for_placements() -> None:
    """Planning cost follows distinct shardings: 6 layers in two placements have two of each expert tensor."""
    shape = replace(preset("tiny_qwen3_moe"), num_layers=6)
    assert shape.experts is not None
    shape = replace(shape, experts=replace(shape.experts, layers=(True,) * 6))
    rows = (tuple(range(8)), tuple(reversed(range(8))))
    placed = side(2, ep=True, placement=ExpertPlacement("map.json", rows * 3))
    linear, mixed = (predict(shape, spec) for spec in (side(2, ep=True), placed))
    distinct = [len({id(sharding) for sharding in one.by_key.values()}) for one in (linear, mixed)]
    assert distinct[1] == distinct[0] + 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rl-inference-tensor-model-parallel-size=3"], "destination: 8 attention heads cannot be divided by TP"),
        (
            ["--rl-inference-tensor-model-parallel-size=4", "--rl-inference-expert-model-parallel-size=2"],
            "EP size 2 of an engine with TP x DP = 4 x 1: .* give EP 4 or 1",
        ),
        (
            ["--rl-inference-tensor-model-parallel-size=2", "--rl-inference-replicas=3", "--destination-world-size=8"],
            "8 ranks are no TP x DP x PP x engines = 2 x 1 x 1 x 3 = 6: give 6",
        ),
        (
            ["--rl-inference-data-parallel-size=16", "--rl-inference-expert-model-parallel-size=16"],
            "EP size 16 leaves ranks without any of 8 experts",
        ),
        (["--rl-inference-pipeline-model-parallel-size=8"], "2 layers are fewer than 8 pipeline stages: lower PP to 2"),
        (["--rl-inference-expert-placement=round_robin"], "placement round_robin on EP size 1"),
        (["--rl-inference-num-redundant-experts=1"], "1 redundant experts on EP size 1"),
        (["--rl-inference-expert-placement=no.json"], "no.json is no strategy"),
        (
            [
                "--rl-inference-data-parallel-size=3",
                "--rl-inference-expert-model-parallel-size=3",
                "--rl-inference-expert-placement-next=round_robin",
                "--rl-inference-num-redundant-experts=1",
            ],
            "1 redundant experts with placement round_robin",
        ),
    ],
)
def test_sizes_that_vllm_has_not_are_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        parse([*FLAGS, "--model=tiny_qwen3_moe", *flags])
    assert "\n" not in str(refused.value)


def test_ranks_that_are_given_are_filled_with_data_parallel_ones() -> None:
    scenario = parse([*FLAGS, "--model=tiny_qwen3_moe", "--destination-world-size=4", "--expert-model-parallel-size=2"])
    assert scenario.scenario.destination.title == "vllm TP1 DP4 EP4"


def test_flags_of_engines_need_the_format() -> None:
    with pytest.raises(
        UsageError, match="--rl-inference-replicas needs --rl-inference-format vllm, the destination is"
    ):
        parse(["--dry-run", "--model=tiny", "--rl-inference-replicas=2"])
    with pytest.raises(UsageError, match=r"source-format: invalid choice: 'vllm'"):
        parse(["--dry-run", "--model=tiny_qwen3", "--source-format=vllm"])


def test_the_vocabulary_is_padded_as_vllm_pads_it() -> None:
    assert padded_vocab_size(replace(preset("tiny_qwen3"), vocab_size=1001)) == 1024


def test_layers_of_several_kinds_with_experts_in_the_same_places_have_one_map() -> None:
    shape = preset("tiny_qwen3_next")
    assert len(set(shape.kinds)) == 2
    (found,) = expert_maps(predict(shape, side(tp=2, ep=2)))
    assert found.layers == (0, 1)
