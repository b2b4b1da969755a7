"""Qwen3-Next: gated delta nets in most layers, gated attention in the others, experts and a gated shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refit.config import yaml_files
from refit.config.shape import ModelShape
from refit.errors import UsageError
from refit.predict.families import qwen3_moe
from refit.predict.families.config_keys import EXPERTS, GROUPED_QUERIES, LINEAR_ATTENTION, ROUTED, SIZES, Key, whole
from refit.predict.families.tables import (
    DENSE_MLP,
    FC1,
    FC2,
    FUSED_EXPERTS,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    QUERY_KEY_NORMS,
    ROUTER,
    SHARED,
    SHARED_GATE,
    SINGLE_EXPERTS,
    Family,
    Part,
    Row,
)
from refit.predict.megatron import Split

GATED_ATTENTION = (
    replace(GROUPED_QUERY_ATTENTION[0], part=Part.QUERY_AND_GATE),
    *GROUPED_QUERY_ATTENTION[1:],
    *QUERY_KEY_NORMS,
)
GATED_DELTA_NET = (
    Row(
        "linear_attn.in_proj_qkvz.weight",
        "self_attention.query.in_proj.weight",
        Split.COLUMN,
        Part.IN_TURN,
        others=tuple(f"self_attention.{name}.in_proj.weight" for name in ("key", "value", "z")),
        in_transformers=Split.COLUMN,
    ),
    Row(
        "linear_attn.in_proj_ba.weight",
        "self_attention.beta.in_proj.weight",
        Split.COLUMN,
        Part.IN_TURN,
        others=("self_attention.alpha.in_proj.weight",),
        in_transformers=Split.COLUMN,
    ),
    Row(
        "linear_attn.conv1d.weight",
        "self_attention.query.conv1d.weight",
        Split.COLUMN,
        Part.SECTIONS,
        others=tuple(f"self_attention.{name}.conv1d.weight" for name in ("key", "value")),
        in_transformers=Split.REPLICATED,
    ),
    Row("linear_attn.dt_bias", "self_attention.dt_bias", Split.COLUMN, in_transformers=Split.REPLICATED),
    Row(
        "linear_attn.A_log",
        "self_attention.A_log",
        Split.COLUMN,
        in_transformers=Split.REPLICATED,
        float32_in_vllm=True,
    ),
    Row("linear_attn.norm.weight", "self_attention.out_norm.weight"),
    Row("linear_attn.out_proj.weight", "self_attention.out_proj.weight", Split.ROW, in_transformers=Split.COLUMN),
)
GATED_SHARED_EXPERT = (
    Row("mlp.shared_expert.gate_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.GATE),
    Row("mlp.shared_expert.up_proj.weight", f"{SHARED}.{FC1}", Split.COLUMN, Part.UP),
    Row("mlp.shared_expert.down_proj.weight", f"{SHARED}.{FC2}", Split.ROW),
    Row("mlp.shared_expert_gate.weight", SHARED_GATE),
)
FULL_ATTENTION_INTERVAL = 4
"""Of transformers, where config.json has neither it nor `layer_types`."""


def layer_flags(content: Mapping[str, Any], num_layers: int) -> dict[str, object]:
    """Which layers have routed experts, and which a delta net."""
    interval = whole("full_attention_interval", content.get("full_attention_interval", FULL_ATTENTION_INTERVAL))
    types = content.get("layer_types")
    if types is None:
        nets = [int((layer + 1) % interval > 0) for layer in range(num_layers)]
    elif isinstance(types, list) and len(types) >= num_layers:
        nets = [int(kind == LINEAR_ATTENTION) for kind in types[:num_layers]]
    else:
        raise UsageError(f"layer_types must list {num_layers} layers, got {yaml_files.shortened(types)}")
    return {**qwen3_moe.layer_flags(content, num_layers), "linear-attention-freq": f"{nets}"}


def layer_values(shape: ModelShape) -> dict[str, Any]:
    """The kind of every layer."""
    return {"layer_types": [LINEAR_ATTENTION if kind.delta_net else "full_attention" for kind in shape.kinds]}


def misfit(shape: ModelShape) -> str | None:
    """What to change: the only expert of a token would have weight 1."""
    return "give --moe-router-topk 2 or more" if shape.experts is not None and shape.experts.topk == 1 else None


QWEN3_NEXT = Family(
    "qwen3_next",
    fits=lambda shape: shape.mla is None and shape.experts is not None and shape.delta_net is not None,
    model=MODEL,
    layer=(*NORMS, *GATED_ATTENTION),
    linear=(*NORMS, *GATED_DELTA_NET),
    dense=DENSE_MLP,
    routed=(*ROUTER, *GATED_SHARED_EXPERT),
    experts=FUSED_EXPERTS,
    single_experts=SINGLE_EXPERTS,
    keys=(
        *SIZES,
        *GROUPED_QUERIES,
        *ROUTED,
        EXPERTS,
        Key("shared_expert_intermediate_size", "moe-shared-expert-intermediate-size", "experts.shared_ffn_hidden_size"),
        Key("linear_num_key_heads", "linear-num-key-heads", "delta_net.num_key_heads", optional=True),
        Key("linear_key_head_dim", "linear-key-head-dim", "delta_net.key_head_dim", optional=True),
        Key("linear_num_value_heads", "linear-num-value-heads", "delta_net.num_value_heads", optional=True),
        Key("linear_value_head_dim", "linear-value-head-dim", "delta_net.value_head_dim", optional=True),
        Key("linear_conv_kernel_dim", "linear-conv-kernel-dim", "delta_net.conv_kernel_dim", optional=True),
    ),
    style={
        "qk-layernorm": True,
        "group-query-attention": True,
        "attention-output-gate": True,
        "experimental-attention-variant": "gated_delta_net",
        "moe-shared-expert-gate": True,
    },
    layer_keys=("decoder_sparse_step", "mlp_only_layers", "full_attention_interval"),
    layer_flags=layer_flags,
    layer_values=layer_values,
    expert_values=qwen3_moe.expert_values,
    numerics={"partial_rotary_factor": 1.0},
    misfit=misfit,
)
