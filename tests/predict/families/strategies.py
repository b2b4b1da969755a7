"""Random models of each family."""

from __future__ import annotations

from hypothesis import strategies as st

from refit.config.shape import Experts, LatentAttention, ModelShape
from refit.predict.families.deepseek_v3 import DEEPSEEK_V3
from refit.predict.families.qwen3 import QWEN3
from refit.predict.families.tables import Family, families


@st.composite
def models(draw: st.DrawFn, family: Family | None = None) -> ModelShape:
    """A small model of `family`, or of any. Every size that a table cuts at differs from most others."""
    family = family or draw(st.sampled_from(families()))
    size = st.integers(1, 6)
    num_layers = draw(st.integers(1, 3))
    groups, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    latent = LatentAttention(draw(st.none() | size), draw(size), draw(size), 2 * draw(size), draw(size))
    return ModelShape(
        num_layers=num_layers,
        hidden_size=draw(size),
        num_attention_heads=groups * queries,
        num_query_groups=groups * queries if family is DEEPSEEK_V3 else groups,
        kv_channels=2 * draw(size),
        ffn_hidden_size=draw(size),
        vocab_size=draw(st.integers(1, 20)),
        make_vocab_size_divisible_by=draw(st.sampled_from([1, 8])),
        max_position_embeddings=16,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        tied_embeddings=draw(st.booleans()),
        qk_layernorm=True,
        mla=latent if family is DEEPSEEK_V3 else None,
        experts=None if family is QWEN3 else draw(experts(num_layers, family)),
    )


@st.composite
def experts(draw: st.DrawFn, num_layers: int, family: Family) -> Experts:
    num_dense = draw(st.integers(0, num_layers - 1))
    deepseek = family is DEEPSEEK_V3
    ffn = draw(st.integers(1, 5))
    return Experts(
        num_experts=draw(st.integers(1, 6)),
        topk=1,
        ffn_hidden_size=ffn,
        shared_ffn_hidden_size=ffn * draw(st.integers(1, 2)) if deepseek else None,
        layers=(False,) * num_dense + (True,) * (num_layers - num_dense),
        expert_bias=deepseek,
        grouped_gemm=draw(st.booleans()),
    )
