"""One table per model family: its tensors as Hugging Face names them, and the logical tensor that each is a part of.

Logical tensors are those of `refit.predict.megatron`. Names are those of transformers 5 (`state_dict()` of the causal
language model) and, for single experts, of the published checkpoints. A format that joins tensors (vLLM's `qkv_proj`)
joins rows of these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from refit.config.shape import ModelShape
from refit.predict.megatron import Split

Release = tuple[int, int]
"""The first two numbers of a version of transformers."""


class Part(Enum):
    """The rows of a logical tensor that a Hugging Face tensor has, in order."""

    WHOLE = "all of them"
    QUERY = "of every query group [queries; key; value], the queries"
    KEY = "of every query group, the key"
    VALUE = "of every query group, the value"
    GATE = "of [gate; up], the first half"
    UP = "of [gate; up], the second half"


@dataclass(frozen=True, slots=True)
class Row:
    """A Hugging Face tensor and the rows of the logical tensor `key` that it has. Both names are below the layer's.

    `split` is how tensor parallelism splits it. A `routed` tensor is `[num_experts, ...]`, or with `{expert}` in its
    name one expert's. `optional` ones exist only where the logical tensor does. A `buffer` is no parameter.
    From release `float32_since` on, transformers keeps a parameter in float32 in models of 16 bits.
    """

    name: str
    key: str
    split: Split = Split.REPLICATED
    part: Part = Part.WHOLE
    routed: bool = False
    optional: bool = False
    buffer: bool = False
    float32_since: Release | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """The tables of one family. `model_type` is that of config.json; `aliases` are others with the same tensors.

    A layer has the tensors of `layer`, and those of `dense` or `routed` by its MLP. `single_experts` are the routed
    experts where each has tensors of its own, as in published checkpoints.
    """

    model_type: str
    model: tuple[Row, ...]
    layer: tuple[Row, ...]
    dense: tuple[Row, ...]
    routed: tuple[Row, ...] = ()
    experts: tuple[Row, ...] = ()
    single_experts: tuple[Row, ...] = ()
    aliases: tuple[str, ...] = ()


# The logical tensors that several rows name.
QKV = "self_attention.linear_qkv.weight"
FC1, FC2 = "linear_fc1.weight", "linear_fc2.weight"
EXPERTS, SHARED = "mlp.experts.experts", "mlp.shared_experts"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

MODEL = (
    Row("model.embed_tokens.weight", EMBEDDING, Split.COLUMN),
    Row("model.norm.weight", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", OUTPUT, Split.COLUMN, optional=True),  # absent where embeddings are tied
)
NORMS = (
    Row("input_layernorm.weight", "input_layernorm.weight"),
    Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
)
GROUPED_QUERY_ATTENTION = (
    Row("self_attn.q_proj.weight", QKV, Split.COLUMN, Part.QUERY),
    Row("self_attn.k_proj.weight", QKV, Split.COLUMN, Part.KEY),
    Row("self_attn.v_proj.weight", QKV, Split.COLUMN, Part.VALUE),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", Split.ROW),
    Row("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Row("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
)
LATENT_ATTENTION = (
    # Queries are projected in one step, or down and up with a norm between.
    Row("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight", Split.COLUMN, optional=True),
    Row("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight", optional=True),
    Row("self_attn.q_a_layernorm.weight", "self_attention.q_layernorm.weight", optional=True),
    Row("self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight", Split.COLUMN, optional=True),
    Row("self_attn.kv_a_proj_with_mqa.weight", "self_attention.linear_kv_down_proj.weight"),
    Row("self_attn.kv_a_layernorm.weight", "self_attention.kv_layernorm.weight"),
    Row("self_attn.kv_b_proj.weight", "self_attention.linear_kv_up_proj.weight", Split.COLUMN),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", Split.ROW),
)
DENSE_MLP = (
    Row("mlp.gate_proj.weight", f"mlp.{FC1}", Split.COLUMN, Part.GATE),
    Row("mlp.up_proj.weight", f"mlp.{FC1}", Split.COLUMN, Part.UP),
    Row("mlp.down_proj.weight", f"mlp.{FC2}", Split.ROW),
)
ROUTER = (Row("mlp.gate.weight", "mlp.router.weight"),)
FLOAT32_ROUTER = (Row("mlp.gate.weight", "mlp.router.weight", float32_since=(5, 24)),)
EXPERT_BIAS = (Row("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", buffer=True),)
SHARED_EXPERTS = (
    Row("mlp.shared_experts.gate_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.GATE),
    Row("mlp.shared_experts.up_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.UP),
    Row("mlp.shared_experts.down_proj.weight", f"{SHARED}.{FC2}", Split.ROW),
)
FUSED_EXPERTS = (
    Row("mlp.experts.gate_up_proj", f"{EXPERTS}.{FC1}", Split.GATED, routed=True),
    Row("mlp.experts.down_proj", f"{EXPERTS}.{FC2}", Split.ROW, routed=True),
)
SINGLE_EXPERTS = (
    Row("mlp.experts.{expert}.gate_proj.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.GATE, routed=True),
    Row("mlp.experts.{expert}.up_proj.weight", f"{EXPERTS}.{FC1}", Split.COLUMN, Part.UP, routed=True),
    Row("mlp.experts.{expert}.down_proj.weight", f"{EXPERTS}.{FC2}", Split.ROW, routed=True),
)

QWEN3 = Family("qwen3", model=MODEL, layer=(*NORMS, *GROUPED_QUERY_ATTENTION), dense=DENSE_MLP)
QWEN3_MOE = Family(
    "qwen3_moe",
    model=MODEL,
    layer=(*NORMS, *GROUPED_QUERY_ATTENTION),
    dense=DENSE_MLP,
    routed=ROUTER,
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    model=MODEL,
    layer=(*NORMS, *LATENT_ATTENTION),
    dense=DENSE_MLP,
    routed=(*FLOAT32_ROUTER, *EXPERT_BIAS, *SHARED_EXPERTS),
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    aliases=("kimi_k2",),
)
FAMILIES = (QWEN3, QWEN3_MOE, DEEPSEEK_V3)


def closest_family(shape: ModelShape) -> Family:
    """The family with this kind of attention and MLP. Whether it has all tensors of `shape` is not checked here."""
    if shape.mla is not None:
        return DEEPSEEK_V3
    return QWEN3 if shape.experts is None else QWEN3_MOE
