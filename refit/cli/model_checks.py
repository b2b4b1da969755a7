"""Checks of a model that the flags describe, and notes on what it is probably not meant to be."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from refit import units
from refit.config.layout import Layout
from refit.config.limits import MAX_PARAMETERS
from refit.config.shape import ModelShape
from refit.errors import UsageError

MANY_EXPERTS = 16
"""With more experts than this, experts as wide as the dense MLP are probably an oversight."""


def without_unbuildable_biases(shape: ModelShape, layouts: Sequence[Layout]) -> tuple[ModelShape, str | None]:
    """`shape`, without linear biases where Megatron cannot build them, and a note that says so.

    Megatron-Core refuses biases in shared experts (`SharedExpertMLP`) and in routed experts with ETP > 1
    (`TransformerConfig`). `--disable-bias-linear` is for the whole model, so both sides lose all biases.
    """
    if shape.experts is None or not shape.add_bias_linear or shape.attention_sinks:
        return shape, None  # a gpt-oss has them: Megatron sides refuse layouts that lack them
    etp = max(layout.etp for layout in layouts)
    if shape.experts.shared_ffn_hidden_size is not None:
        reason = "shared experts"
    elif etp > 1:
        reason = f"routed experts with ETP > 1 (here {etp})"
    else:
        return shape, None
    note = f"linear layers are built without biases: Megatron cannot build {reason} with them (--disable-bias-linear)"
    return dataclasses.replace(shape, add_bias_linear=False), note


def check_parameters(shape: ModelShape, layouts: Sequence[Layout]) -> None:
    """Raise UsageError for a model of more than MAX_PARAMETERS, estimated from its matrices."""
    hidden, heads, matrices = shape.hidden_size, shape.num_attention_heads, 3 if shape.swiglu else 2
    if shape.mla is None:
        attention = 2 * hidden * shape.kv_channels * (heads + shape.num_query_groups)
    else:
        mla = shape.mla
        query_width = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
        attention = (mla.q_lora_rank or 0) * (hidden + query_width) + (0 if mla.q_lora_rank else hidden * query_width)
        attention += mla.kv_lora_rank * (hidden + heads * (mla.qk_head_dim + mla.v_head_dim))
        attention += hidden * (mla.qk_pos_emb_head_dim + heads * mla.v_head_dim)
    mlp = matrices * hidden * shape.ffn_hidden_size
    if shape.experts is not None:
        experts, latent = shape.experts, shape.experts.latent_size or hidden
        routed = matrices * latent * experts.num_experts * experts.ffn_hidden_size + 2 * hidden * latent
        mlp = max(mlp, routed + matrices * hidden * (experts.shared_ffn_hidden_size or 0))
    vocabulary = max(shape.padded_vocab_size(layout.tp) for layout in layouts)
    parameters = shape.num_layers * (attention + mlp) + hidden * (2 * vocabulary + shape.max_position_embeddings)
    parameters += shape.mtp_num_layers * (attention + mlp + 2 * hidden * hidden)
    if parameters > MAX_PARAMETERS:
        raise UsageError(
            f"the model has about {parameters:.1e} parameters, {MAX_PARAMETERS:.0e} are the most: "
            "lower its widths, layers or experts"
        )


def wide_experts_note(args: argparse.Namespace, shape: ModelShape) -> str | None:
    """A warning where there are many experts, as wide as the dense MLP because `--moe-ffn-hidden-size` is missing."""
    experts = shape.experts
    if experts is None or args.moe_ffn_hidden_size is not None or experts.num_experts <= MANY_EXPERTS:
        return None
    matrices = 3 if shape.swiglu else 2
    layers = sum(experts.layers)
    width = experts.latent_size or shape.hidden_size
    parameters = layers * experts.num_experts * matrices * width * experts.ffn_hidden_size
    return (
        f"without --moe-ffn-hidden-size each of {experts.num_experts} experts is as wide as the dense MLP, "
        f"{experts.ffn_hidden_size}: {units.count(parameters)} parameters in the routed experts alone"
    )
