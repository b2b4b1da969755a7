"""Random models of each family."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from refit.config.shape import DeltaNet, Experts, LatentAttention, ModelShape
from refit.predict.families.glm4_moe_lite import GLM4_MOE_LITE
from refit.predict.families.gpt_oss import GPT_OSS
from refit.predict.families.minimax_m2 import MINIMAX_M2
from refit.predict.families.mixtral import MIXTRAL
from refit.predict.families.qwen3_next import QWEN3_NEXT
from refit.predict.families.tables import (
    EXPERT_BIAS_KEY,
    QKV_BIAS,
    QUERY_NORM,
    SHARED,
    SHARED_GATE,
    Family,
    closest_family,
    families,
)


@st.composite
def models(draw: st.DrawFn, family: Family | None = None) -> ModelShape:
    """A small model of `family`, or of any. Every size that a table cuts at differs from most others."""
    family = family or draw(st.sampled_from(families()))
    size = st.integers(1, 6)
    num_layers = draw(st.integers(1, 3))
    groups, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    latent = LatentAttention(draw(st.none() | size), draw(size), draw(size), 2 * draw(size), draw(size))
    is_latent = family.has("self_attention.linear_kv_up_proj.weight")
    shape = ModelShape(
        num_layers=num_layers,
        hidden_size=draw(size),
        num_attention_heads=groups * queries,
        num_query_groups=groups * queries if is_latent else groups,
        kv_channels=2 * draw(size),
        ffn_hidden_size=draw(size),
        vocab_size=draw(st.integers(1, 20)),
        make_vocab_size_divisible_by=draw(st.sampled_from([1, 8])),
        max_position_embeddings=16,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=family is GPT_OSS,
        add_qkv_bias=family is not GPT_OSS
        and (family.needs(QKV_BIAS) or (family.has(QKV_BIAS) and draw(st.booleans()))),
        attention_sinks=family is GPT_OSS,
        quick_geglu=family is GPT_OSS,
        tied_embeddings=draw(st.booleans()),
        qk_layernorm=is_latent or family.needs(QUERY_NORM) or (family.has(QUERY_NORM) and draw(st.booleans())),
        mla=latent if is_latent else None,
        experts=draw(experts(num_layers, family)) if family.experts else None,
        qk_norm_over_heads=family.norms_over_heads,
        delta_net=draw(delta_nets(num_layers)) if family.linear else None,
        attention_output_gate=bool(family.linear),
    )
    if family is GLM4_MOE_LITE:  # whose heads do not divide the hidden size
        shape = replace(shape, num_attention_heads=shape.hidden_size + 1, num_query_groups=shape.hidden_size + 1)
    return fitting(shape)


def fitting(shape: ModelShape) -> ModelShape:
    """`shape`, as wide as its heads together, or its experts as wide as MLPs, where its family has no other width."""
    if closest_family(shape).misfit(shape) is None:
        return shape
    if shape.experts is not None and shape.mla is None:
        return replace(shape, ffn_hidden_size=shape.experts.ffn_hidden_size)
    return replace(shape, hidden_size=shape.num_attention_heads * shape.kv_channels)


@st.composite
def experts(draw: st.DrawFn, num_layers: int, family: Family) -> Experts:
    has_dense = family.layer_keys and family is not MINIMAX_M2
    num_dense = draw(st.integers(0, num_layers - 1)) if has_dense else 0
    ffn = draw(st.integers(1, 5))
    return Experts(
        num_experts=draw(st.integers(2, 6)),
        topk=2 if family in (MIXTRAL, MINIMAX_M2, GPT_OSS, QWEN3_NEXT) else 1,
        ffn_hidden_size=ffn,
        shared_ffn_hidden_size=ffn * draw(st.integers(1, 2)) if family.has(SHARED) else None,
        layers=(False,) * num_dense + (True,) * (num_layers - num_dense),
        expert_bias=family.has(EXPERT_BIAS_KEY),
        grouped_gemm=draw(st.booleans()),
        shared_gate=family.has(SHARED_GATE),
    )


@st.composite
def delta_nets(draw: st.DrawFn, num_layers: int) -> DeltaNet:
    size, key_heads = st.integers(1, 4), draw(st.integers(1, 3))
    return DeltaNet(
        num_key_heads=key_heads,
        key_head_dim=draw(size),
        num_value_heads=key_heads * draw(st.integers(1, 3)),
        value_head_dim=draw(size),
        conv_kernel_dim=draw(size),
        layers=tuple(draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))),
    )
