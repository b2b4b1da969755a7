"""gpt-oss: attention sinks and alternating windows, biases everywhere, experts with gate and up interleaved."""

from __future__ import annotations

from typing import Any

from refit.config.shape import ATTENTION_WINDOW, GEGLU_LIMIT, ROTARY_BASE, SINKS_NORM_EPSILON, Experts, ModelShape
from refit.errors import UsageError
from refit.predict.families import mixtral
from refit.predict.families.config_keys import GROUPED_QUERIES, LOCAL_EXPERTS, ROUTED, SIZES
from refit.predict.families.tables import (
    DENSE_MLP,
    EXPERTS,
    FC1,
    FC2,
    GROUPED_QUERY_ATTENTION,
    MODEL,
    NORMS,
    PROJECTION_BIAS,
    QUERY_KEY_VALUE_BIASES,
    SINKS,
    Family,
    Row,
)
from refit.predict.megatron import Split

FIRST, SECOND = (f"{EXPERTS}.{linear.removesuffix('.weight')}" for linear in (FC1, FC2))
FUSED_EXPERTS = (
    Row("mlp.experts.gate_up_proj", f"{FIRST}.weight", Split.GATED, routed=True, transposed=True, interleaved=True),
    Row("mlp.experts.gate_up_proj_bias", f"{FIRST}.bias", Split.GATED, routed=True, interleaved=True),
    Row("mlp.experts.down_proj", f"{SECOND}.weight", Split.ROW, routed=True, transposed=True),
    Row("mlp.experts.down_proj_bias", f"{SECOND}.bias", routed=True),
)
ENGINE_EXPERTS = (
    Row("mlp.experts.gate_up_proj", f"{FIRST}.weight", Split.COLUMN, routed=True, interleaved=True),
    Row("mlp.experts.gate_up_proj_bias", f"{FIRST}.bias", Split.COLUMN, routed=True, interleaved=True),
    Row("mlp.experts.down_proj", f"{SECOND}.weight", Split.ROW, routed=True),
    Row("mlp.experts.down_proj_bias", f"{SECOND}.bias", routed=True),
)
"""vLLM transposes what transformers has transposed, and leaves gate and up rows in turn (models/gpt_oss.py)."""


def expert_values(experts: Experts) -> dict[str, Any]:
    """No values beside the sizes. Raises UsageError where some layers have no experts."""
    if not all(experts.layers):
        layer = experts.layers.index(False)
        raise UsageError(f"a gpt_oss has experts in every layer, here layer {layer} has none: give --moe-layer-freq 1")
    return {}


def engine_values(shape: ModelShape) -> dict[str, Any]:
    """The rotary embedding by the only name that vLLM's model knows; scaled by 1 it is the plain one."""
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "factor": 1.0}
    positions = {"original_max_position_embeddings": shape.max_position_embeddings}
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": ROTARY_BASE, **yarn, **positions}}


GPT_OSS = Family(
    "gpt_oss",
    fits=lambda shape: shape.mla is None and shape.experts is not None and shape.attention_sinks,
    model=MODEL,
    layer=(
        *NORMS,
        *GROUPED_QUERY_ATTENTION,
        *QUERY_KEY_VALUE_BIASES,
        Row("self_attn.o_proj.bias", PROJECTION_BIAS),
        Row("self_attn.sinks", SINKS, Split.COLUMN),
    ),
    dense=DENSE_MLP,
    routed=(Row("mlp.router.weight", "mlp.router.weight"), Row("mlp.router.bias", "mlp.router.bias")),
    experts=FUSED_EXPERTS,
    single_experts=FUSED_EXPERTS,
    keys=(*SIZES, *GROUPED_QUERIES, ROUTED[0], LOCAL_EXPERTS),
    style={
        "swiglu": False,
        "quick-geglu": True,
        "disable-bias-linear": False,
        "softmax-type": "learnable",
        "group-query-attention": True,
    },
    expert_values=expert_values,
    derived={"experts_per_token": ("num_experts_per_tok",)},
    required={"attention_bias": (True, "its attention has biases")},
    numerics={"attention_bias": True, "sliding_window": ATTENTION_WINDOW, "rms_norm_eps": SINKS_NORM_EPSILON},
    unweighted={
        "sliding_window": (None, ATTENTION_WINDOW),
        "swiglu_limit": (None, GEGLU_LIMIT),
        "swiglu_alpha": (None, 1.702),
        "initial_context_length": (None,),
        "rms_norm_eps": (None, SINKS_NORM_EPSILON),
    },
    engine_names={"self_attn.": "attn.", "model.embed_tokens": "model.embedding"},
    engine_experts=ENGINE_EXPERTS,
    eager_attention=True,
    engine_values=engine_values,
    misfit=mixtral.misfit,
)
