"""ModelShape: the architecture numbers that decide which tensors a model has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from refit.config.layout import Layout
from refit.errors import UsageError


class Dtype(str, Enum):
    """Dtype of the parameters, by the name torch gives it. Buffers such as the router's expert bias stay float32."""

    BF16 = "bfloat16"
    FP16 = "float16"
    FP32 = "float32"


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-latent attention (DeepSeek-V2, arXiv:2405.04434). `q_lora_rank` None projects queries in one step."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts. `layers[i]` says whether layer `i` has routed experts or a dense MLP."""

    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int | None
    layers: tuple[bool, ...]
    expert_bias: bool
    grouped_gemm: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer as Megatron-Core's GPTModel builds it.

    `num_query_groups` equals `num_attention_heads` without grouped queries. `vocab_size` is the tokenizer's; each side
    pads it by its own TP size (`padded_vocab_size`).
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    make_vocab_size_divisible_by: int
    max_position_embeddings: int
    position_embedding_type: str
    normalization: str
    swiglu: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    tied_embeddings: bool
    qk_layernorm: bool
    mla: LatentAttention | None
    experts: Experts | None
    dtype: Dtype

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary rounded up to a multiple of `make_vocab_size_divisible_by * tp` (Megatron-LM's rule)."""
        multiple = self.make_vocab_size_divisible_by * tp
        return math.ceil(self.vocab_size / multiple) * multiple

    def check_layout(self, layout: Layout, side: str) -> None:
        """Raise UsageError where Megatron could not build this model in `layout`; `side` names it in the message."""
        tp = layout.tp
        divisible = [
            (self.num_attention_heads, tp, "attention heads", "TP size"),
            (self.ffn_hidden_size, tp, "FFN hidden size", "TP size"),
        ]
        if self.mla is None and self.num_query_groups > tp:
            divisible.append((self.num_query_groups, tp, "query groups", "TP size"))
        if self.mla is None and self.num_query_groups < tp:
            divisible.append((tp, self.num_query_groups, "TP size", "query groups"))
        if self.experts is not None:
            divisible += [
                (self.experts.num_experts, layout.ep, "experts", "EP size"),
                (self.experts.ffn_hidden_size, layout.etp, "expert FFN hidden size", "ETP size"),
                (self.experts.shared_ffn_hidden_size or tp, tp, "shared expert FFN hidden size", "TP size"),
            ]
        for number, divisor, what, by in divisible:
            if number % divisor:
                raise UsageError(f"{side}: {number} {what} cannot be divided by {by} {divisor}")
        if self.experts is None and layout.ep > 1:
            raise UsageError(f"{side}: EP size {layout.ep} needs experts: give --num-experts or set EP to 1")
        layout.stage_layers(self.num_layers)
