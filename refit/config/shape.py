"""ModelShape: the architecture numbers that decide which tensors a model has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

NORM_EPSILON = 1e-6
ROTARY_BASE = 10000.0
"""Settings of the forward pass that no weight depends on, the same for the models of every library."""

SINKS_NORM_EPSILON = 1e-5
"""With attention sinks, in place of NORM_EPSILON."""

GEGLU_OFFSET, GEGLU_LIMIT = 1.0, 7.0
"""Of `quick_geglu`, as in gpt-oss: added to up, and the bound of gate from above and of up on both sides."""
ATTENTION_WINDOW = 16
"""With attention sinks, every other layer from the first on sees so many tokens, the last ones."""


class Dtype(str, Enum):
    """Dtype of the parameters, by the name torch gives it. Buffers such as the router's expert bias stay float32."""

    BF16 = "bfloat16"
    FP16 = "float16"
    FP32 = "float32"


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    q_lora_rank: int | None
    """None projects queries in one step."""
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta nets (arXiv:2412.06464), linear attention as in Qwen3-Next."""

    num_key_heads: int
    key_head_dim: int
    num_value_heads: int
    """A multiple of the key heads, each of which serves as many of them."""
    value_head_dim: int
    conv_kernel_dim: int
    """Tokens that are convolved."""
    layers: tuple[bool, ...]
    """Whether layer i has one in place of attention."""

    @property
    def key_width(self) -> int:
        """Of the queries of all heads together, and of the keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Of the values of all heads together, and of their gates."""
        return self.num_value_heads * self.value_head_dim


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What decides which tensors a decoder layer has: routed experts or a dense MLP, a delta net or attention."""

    routed: bool
    delta_net: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts."""

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int | None
    layers: tuple[bool, ...]
    """Whether each layer has routed experts; else a dense MLP."""
    expert_bias: bool
    grouped_gemm: bool
    latent_size: int | None = None
    """The width that routed experts work in, between two projections; None is the model's own."""
    shared_gate: bool = False
    """Each token weighs what the shared experts add."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer as Megatron-Core's GPTModel builds it."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Equals `num_attention_heads` without grouped queries."""
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    """The tokenizer's; each side pads it by its own TP size (`padded_vocab_size`)."""
    make_vocab_size_divisible_by: int
    max_position_embeddings: int
    position_embedding_type: str
    normalization: str
    swiglu: bool
    """MLPs are gated."""
    add_bias_linear: bool
    add_qkv_bias: bool
    tied_embeddings: bool
    qk_layernorm: bool
    mla: LatentAttention | None
    experts: Experts | None
    mtp_num_layers: int = 0
    """Multi-token prediction layers behind the last layer (DeepSeek-V3, arXiv:2412.19437), each with a layer of the
    last one's kind."""
    qk_norm_over_heads: bool = False
    """Norms of queries and keys run over all heads together (MiniMax-M2), not over each."""
    attention_sinks: bool = False
    """Every head has a learned score that no value belongs to (gpt-oss)."""
    quick_geglu: bool = False
    """MLPs have gpt-oss's activation."""
    delta_net: DeltaNet | None = None
    attention_output_gate: bool = False
    """Each value of a head's output has a gate (Qwen3-Next)."""

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """That of every decoder layer."""
        none = (False,) * self.num_layers
        routed = self.experts.layers if self.experts is not None else none
        delta_net = self.delta_net.layers if self.delta_net is not None else none
        return tuple(LayerKind(*each) for each in zip(routed, delta_net, strict=True))

    @property
    def norms_add_one(self) -> bool:
        """Whether norms multiply by 1 + their weights: those of models with delta nets, but for the nets' own."""
        return self.delta_net is not None

    @property
    def norm_epsilon(self) -> float:
        """That of all its norms: gpt-oss has its own, which vLLM does not read from config.json (models/gpt_oss.py)."""
        return SINKS_NORM_EPSILON if self.attention_sinks else NORM_EPSILON

    @property
    def softmax_over_all(self) -> bool:
        """Whether a softmax over all experts weighs those of a token, not one over these: DeepSeek-V2's routers, and
        those with one expert for each token, whose weight would be 1. Routers with a bias have sigmoids."""
        experts = self.experts
        return experts is not None and not experts.expert_bias and (experts.topk == 1 or self.mla is not None)

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary rounded up to a multiple of `make_vocab_size_divisible_by * tp` (Megatron-LM's rule)."""
        multiple = self.make_vocab_size_divisible_by * tp
        return math.ceil(self.vocab_size / multiple) * multiple
