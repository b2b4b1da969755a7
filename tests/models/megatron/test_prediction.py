"""Predicted shardings against live models: the prediction is what Megatron states, on every rank."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.models.megatron.sharding import read_weights
from refit.predict.megatron import predict
from refit.predict.megatron_layout import check
from tests.models.megatron.small import (
    DELTA_NETS,
    DENSE,
    EXPERTS,
    LATENT,
    LATENT_EXPERTS,
    MLA,
    MOE,
    NETS,
    SEQUENTIAL,
    built,
    layout,
    playing,
    spec,
    written,
)

UNEVEN = Layout(tp=2, ep=2, etp=1, pp=2, world_size=8, first_stage_layers=3)
UNEVEN_LAST = Layout(tp=1, ep=1, etp=1, pp=3, world_size=3, last_stage_layers=2)
UNEVEN_ENDS = ("first_stage_layers", "last_stage_layers")
BIASED = {"add_bias_linear": True, "add_qkv_bias": True}
NO_SHARED = replace(EXPERTS, shared_ffn_hidden_size=None)


def all_layouts() -> list[Layout]:
    """TP 1, 2, 4 x EP 1, 2, 4 x ETP 1, 2 x PP 1, 2 on the fewest ranks that they allow, and on TP x EP x PP ranks."""
    found = []
    for tp, ep, etp, pp in [(t, e, x, p) for t in (1, 2, 4) for e in (1, 2, 4) for x in (1, 2) for p in (1, 2)]:
        worlds = {pp * math.lcm(tp, ep * etp), pp * tp * ep}
        found += [
            layout(tp, ep, etp, pp, world) for world in sorted(worlds) if world <= 8 and world % (etp * ep * pp) == 0
        ]
    return found


def differences(shape: ModelShape, where: Layout, dtype: Dtype = Dtype.FP32) -> list[str]:
    """Differences between the predicted and the live sharding over all ranks, in boxes and in bytes."""
    predicted, lines = predict(shape, spec(where, dtype)), []
    for rank in where.ranks:
        with playing(rank, where.world_size):
            model = built(shape, where, dtype=dtype)
            assert model is not None
            memory = read_weights(model)
        lines += [f"rank {rank}: {line}" for line in predicted.of_rank(rank).differences(memory.rank_sharding)]
        if memory.nbytes != predicted.bytes_per_rank[rank]:
            lines.append(f"rank {rank}: {predicted.bytes_per_rank[rank]} bytes predicted, {memory.nbytes} held")
    return lines


@pytest.mark.parametrize("shape", [SEQUENTIAL, LATENT], ids=["gqa-sequential", "mla-grouped"])
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["every-fourth", "all"])
def test_every_layout(shape: ModelShape, step: int) -> None:
    found = {str(where): lines for where in all_layouts()[::step] if (lines := differences(shape, where))}
    assert not found


MTP = replace(DENSE, mtp_num_layers=1)
ATTENTION_LAST = replace(NETS, layers=(True, False, True, False))
SHAPES = {
    "dense": DENSE,
    "grouped": MOE,
    "no shared expert": replace(SEQUENTIAL, experts=replace(NO_SHARED, grouped_gemm=False)),
    "every layer routed": replace(MOE, experts=replace(EXPERTS, layers=(True,) * 4, expert_bias=False, topk=1)),
    "not gated": replace(SEQUENTIAL, swiglu=False),
    "not gated, grouped": replace(MOE, swiglu=False),
    "tied": replace(MOE, tied_embeddings=True),
    "layer norm": replace(MOE, normalization="LayerNorm", qk_layernorm=True),
    "learned positions": replace(DENSE, position_embedding_type="learned_absolute"),
    "qk norm": replace(SEQUENTIAL, qk_layernorm=True),
    "attention sinks": replace(DENSE, attention_sinks=True, quick_geglu=True, **BIASED),
    "qk norm over heads": replace(MOE, normalization="RMSNorm", qk_layernorm=True, qk_norm_over_heads=True),
    "qkv bias": replace(DENSE, add_qkv_bias=True),
    "latent without q rank": replace(LATENT, mla=replace(MLA, q_lora_rank=None), qk_layernorm=False),
    "latent without norms": replace(LATENT, qk_layernorm=False, swiglu=False),
    "one query group": replace(SEQUENTIAL, num_query_groups=1),
    "token prediction": replace(LATENT, mtp_num_layers=2),
    "token prediction, sequential": replace(SEQUENTIAL, mtp_num_layers=1, normalization="LayerNorm"),
    "token prediction, dense": replace(MTP, add_bias_linear=True, swiglu=False),
    "delta nets": DELTA_NETS,
    "delta nets, token prediction": replace(DELTA_NETS, mtp_num_layers=1, delta_net=ATTENTION_LAST),
    "output gates": replace(DENSE, attention_output_gate=True),
    "latent experts": LATENT_EXPERTS,
    "latent experts, sequential": replace(SEQUENTIAL, experts=replace(EXPERTS, latent_size=16, grouped_gemm=False)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str) -> None:
    shape = SHAPES[name]
    layouts = [layout(tp=2), layout(tp=4), layout(tp=2, pp=2), UNEVEN_LAST]
    if shape.experts is not None:
        layouts = [layout(tp=4, ep=2), layout(tp=2, ep=2, etp=2), layout(tp=1, ep=4), UNEVEN, UNEVEN_LAST]
    found = {str(where): lines for where in layouts if (lines := differences(shape, where))}
    assert not found


@st.composite
def small_models(draw: st.DrawFn) -> tuple[ModelShape, Layout]:
    """Up to eight ranks and eight layers, with virtual stages, multi-token prediction and latent experts at random."""
    tp, pp = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2, 4)))
    vpp = draw(st.sampled_from((1, 2))) if pp > 1 else 1
    num_layers = pp * vpp * draw(st.integers(1, 8 // (pp * vpp)))
    ends = [draw(st.sampled_from((None, vpp))) if pp == 2 and num_layers > pp * vpp else None, None]
    ep, etp = draw(st.sampled_from(((1, 1), (tp, 1), (1, tp))))
    where = Layout(
        tp=tp, ep=ep, etp=etp, pp=pp, world_size=tp * pp, vpp=vpp, **dict(zip(UNEVEN_ENDS, ends, strict=True))
    )
    experts = replace(
        EXPERTS,
        layers=tuple(draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))),
        latent_size=draw(st.sampled_from((None, 16))),
        shared_ffn_hidden_size=draw(st.sampled_from((None, 48))),
        grouped_gemm=draw(st.booleans()),
    )
    mtp, tied = draw(st.integers(0, 2)), draw(st.booleans())
    shape = replace(
        draw(st.sampled_from((DENSE, LATENT))),
        num_layers=num_layers,
        experts=experts,
        mtp_num_layers=mtp,
        tied_embeddings=tied and not (mtp and pp > 1),
    )
    return (replace(shape, experts=None) if ep == 1 and draw(st.booleans()) else shape), where


@settings(max_examples=15, deadline=None)
@given(small_models())
def test_chunks_token_prediction_and_latent_experts_in_any_layout(model: tuple[ModelShape, Layout]) -> None:
    assert differences(*model) == []


@st.composite
def written_layouts(draw: st.DrawFn) -> tuple[ModelShape, Layout]:
    """Four decoder layers and up to two prediction layers on any chunks, some of them empty, as Megatron takes them."""
    pp, vpp, mtp = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    chunks = pp * (vpp if pp > 1 else 1)
    places = sorted(draw(st.lists(st.integers(0, chunks - 1), min_size=4, max_size=4)))
    predicts = draw(st.integers(max(places[-1], chunks - pp), chunks - 1))
    texts = [
        "E" * (number == 0) + "t" * places.count(number) + "m" * mtp * (number == predicts) for number in range(chunks)
    ]
    shape = replace(draw(st.sampled_from((DENSE, LATENT, SEQUENTIAL))), mtp_num_layers=mtp)
    alone = mtp == 0 or pp == 1 or (predicts < chunks - 1 and (predicts == 0 or predicts % pp > 0))
    shape = replace(shape, tied_embeddings=alone and draw(st.booleans()))
    return shape, written("|".join(texts) + "L", vpp=chunks // pp, tp=draw(st.sampled_from((1, 2))))


@settings(max_examples=25, deadline=None)
@given(written_layouts())
def test_any_layout_that_is_written_out(model: tuple[ModelShape, Layout]) -> None:
    shape, where = model
    check(shape, spec(where), "source")
    assert differences(shape, where) == []


@pytest.mark.parametrize(("shape", "dtype"), [(LATENT, Dtype.BF16), (SEQUENTIAL, Dtype.FP16)], ids=["bf16", "fp16"])
def test_every_dtype(shape: ModelShape, dtype: Dtype) -> None:
    for where in (layout(tp=4, ep=2), layout(tp=2, ep=2, etp=2), layout(tp=1, ep=4)):
        assert differences(shape, where, dtype) == []


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_biases(grouped: bool) -> None:
    """Megatron has no biases in shared experts, nor in routed ones under ETP."""
    moe = replace(DENSE, experts=replace(NO_SHARED, grouped_gemm=grouped), **BIASED)
    latent = replace(moe, mla=MLA)
    layer_norm = replace(DENSE, normalization="LayerNorm", swiglu=False, **BIASED)
    for shape, where in [
        (moe, layout(tp=2, ep=2)),
        (replace(moe, swiglu=False), layout(ep=4)),
        (latent, layout(tp=2, ep=2, pp=2)),
        (layer_norm, layout(tp=4)),
    ]:
        assert differences(shape, where) == []
