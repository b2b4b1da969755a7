"""From parsed flags to a ModelShape, with Megatron-LM's defaults (`validate_args` in its training/arguments.py)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from refit import units
from refit.cli.flags import DEFAULT_VOCAB_SIZE, model_parser
from refit.config import yaml_files
from refit.config.layout import Layout
from refit.config.limits import MAX_PARAMETERS
from refit.config.shape import Experts, LatentAttention, ModelShape
from refit.errors import UsageError

EXPERT_FLAGS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_grouped_gemm",
)
LATENT_FLAGS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
GROUP_FLAGS = ("num_query_groups", "group_query_attention")

MANY_EXPERTS = 16
"""With more experts than this, experts as wide as the dense MLP are probably an oversight."""


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The model that the flags describe. Raises UsageError where they are incomplete or contradict each other."""
    _check_required(args)
    _check_contradictions(args)
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.kv_channels is None and hidden % heads:
        raise UsageError(
            f"hidden size {hidden} cannot be divided by {heads} attention heads: change one, or give --kv-channels"
        )
    ffn = args.ffn_hidden_size or (hidden * 8 // 3 // 64 * 64 if args.swiglu else 4 * hidden)
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_query_groups(args),
        kv_channels=args.kv_channels or hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=args.padded_vocab_size or args.vocab_size or DEFAULT_VOCAB_SIZE,
        make_vocab_size_divisible_by=1 if args.padded_vocab_size else args.make_vocab_size_divisible_by or 128,
        max_position_embeddings=args.max_position_embeddings or 4096,
        position_embedding_type=args.position_embedding_type or "learned_absolute",
        normalization=args.normalization or "LayerNorm",
        swiglu=args.swiglu,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qk_layernorm=args.qk_layernorm,
        mla=_latent_attention(args),
        experts=_experts(args, ffn),
        mtp_num_layers=args.mtp_num_layers or 0,
    )


def check_no_shape(args: argparse.Namespace) -> None:
    """Raise UsageError where flags describe a model although `--model-provider` builds its own."""
    described = [name for name, value in vars(model_parser().parse_flags([])).items() if getattr(args, name) != value]
    described += [name for name in ("model", "hf_config") if getattr(args, name) is not None]
    if described:
        raise UsageError(f"{_flags(described[:1])} contradicts --model-provider, which builds a model of its own")


def _check_required(args: argparse.Namespace) -> None:
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if getattr(args, name) is None]
    if missing:
        presets = ", ".join(yaml_files.names("models"))
        raise UsageError(f"{_flags(missing)} missing: describe the model, or choose one with --model ({presets})")


def _check_contradictions(args: argparse.Namespace) -> None:
    for allowed, flags, remedy in (
        (args.num_experts is not None, EXPERT_FLAGS, "needs --num-experts"),
        (args.multi_latent_attention, LATENT_FLAGS, "needs --multi-latent-attention"),
        (
            not args.multi_latent_attention,
            GROUP_FLAGS,
            "contradicts --multi-latent-attention, which has no query groups",
        ),
        (args.padded_vocab_size is None, ("vocab_size",), "contradicts --padded-vocab-size: give one of them"),
        (
            args.padded_vocab_size is None,
            ("make_vocab_size_divisible_by",),
            "contradicts --padded-vocab-size, which is not padded any further",
        ),
    ):
        given = [name for name in flags if getattr(args, name)]
        if given and not allowed:
            raise UsageError(f"{_flags(given[:1])} {remedy}")


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _query_groups(args: argparse.Namespace) -> int:
    heads: int = args.num_attention_heads
    # Megatron-LM's default for grouped queries is one group.
    groups: int = args.num_query_groups or (1 if args.group_query_attention else heads)
    if heads % groups:
        raise UsageError(f"{heads} attention heads cannot be divided by {groups} query groups: change one")
    return groups


def _latent_attention(args: argparse.Namespace) -> LatentAttention | None:
    if not args.multi_latent_attention:
        return None
    return LatentAttention(
        q_lora_rank=args.q_lora_rank,
        kv_lora_rank=args.kv_lora_rank or 32,
        qk_head_dim=args.qk_head_dim or 128,
        qk_pos_emb_head_dim=args.qk_pos_emb_head_dim or 64,
        v_head_dim=args.v_head_dim or 128,
    )


def _experts(args: argparse.Namespace, ffn: int) -> Experts | None:
    if args.num_experts is None:
        return None
    topk = args.moe_router_topk or min(2, args.num_experts)
    if topk > args.num_experts:
        raise UsageError(f"--moe-router-topk {topk} is more than the {args.num_experts} experts there are: lower it")
    return Experts(
        num_experts=args.num_experts,
        topk=topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or ffn,
        shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size,
        layers=_expert_layers(args),
        expert_bias=args.moe_router_enable_expert_bias,
        grouped_gemm=args.moe_grouped_gemm,
        latent_size=args.moe_latent_size,
    )


def _expert_layers(args: argparse.Namespace) -> tuple[bool, ...]:
    frequency: int | tuple[bool, ...] = args.moe_layer_freq or 1
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(args.num_layers))
    if len(frequency) != args.num_layers:
        raise UsageError(
            f"--moe-layer-freq lists {len(frequency)} layers, the model has {args.num_layers}: list each once"
        )
    return frequency


def without_unbuildable_biases(shape: ModelShape, layouts: Sequence[Layout]) -> tuple[ModelShape, str | None]:
    """`shape`, without linear biases where Megatron cannot build them, and a note that says so.

    Megatron-Core refuses biases in shared experts (`SharedExpertMLP`) and in routed experts with ETP > 1
    (`TransformerConfig`). `--disable-bias-linear` is for the whole model, so both sides lose all biases.
    """
    if shape.experts is None or not shape.add_bias_linear:
        return shape, None
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
