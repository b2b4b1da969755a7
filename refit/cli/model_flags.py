"""The flags of a model and the ModelShape they describe, with Megatron-LM's defaults.

The defaults are those of `validate_args` in its training/arguments.py.
"""

from __future__ import annotations

import argparse

from refit.cli import flag_types
from refit.cli.delta_net_flags import DELTA_NET_FLAGS, add_delta_net_flags, delta_net
from refit.cli.flag_parser import FlagParser
from refit.config import limits, yaml_files
from refit.config.shape import Dtype, Experts, LatentAttention, ModelShape
from refit.errors import UsageError

DEFAULT_VOCAB_SIZE = 32768
"""Where no vocabulary is given: a power of two, so that both sides hold the same rows at any TP size up to 256."""

EXPERT_FLAGS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_grouped_gemm",
    "moe_shared_expert_gate",
)
NORM_FLAGS = ("qk_norm_over_heads",)
SINKS = "learnable contradicts --multi-latent-attention: leave one of them out"
LATENT_FLAGS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
GROUP_FLAGS = ("num_query_groups", "group_query_attention")


def add_model_flags(parser: FlagParser) -> None:
    _add_size_flags(parser)
    _add_style_flags(parser)
    _add_expert_flags(parser)
    _add_latent_attention_flags(parser)
    add_delta_net_flags(parser)


def _add_size_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("model sizes")
    for name, text in (
        ("num-layers", "transformer layers; required without a preset"),
        ("hidden-size", "width of the residual stream; required without a preset"),
        ("num-attention-heads", "attention heads; required without a preset"),
        (
            "num-query-groups",
            "groups of heads that share keys and values; default: one per head, 1 with --group-query-attention",
        ),
        ("kv-channels", "width of a head; default: hidden size / heads"),
        ("ffn-hidden-size", "width of the dense MLP; default: 4 x hidden, with --swiglu 8/3 x hidden in steps of 64"),
        ("vocab-size", f"tokens before padding; default: {DEFAULT_VOCAB_SIZE}"),
        ("padded-vocab-size", "tokens after padding; default: --vocab-size, padded"),
        ("make-vocab-size-divisible-by", "pad the vocabulary to a multiple of N x TP; default: 128"),
        ("max-position-embeddings", "positions of learned position embeddings; default: 4096"),
    ):
        most = limits.MAX_LAYERS if name == "num-layers" else limits.MAX_SIZE
        group.add_argument(f"--{name}", type=flag_types.up_to(most), metavar="N", help=text)
    group.add_argument(
        "--mtp-num-layers",
        type=flag_types.up_to(limits.MAX_LAYERS, least=0),
        metavar="N",
        help="multi-token prediction layers behind the last layer, as in DeepSeek-V3; default: 0",
    )
    group.add_argument("--group-query-attention", action="store_true", help="share keys and values between heads")


def _add_style_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("model style")
    # Rotary variants (yarn, mrope) have no weights either, but need settings that this parser only records.
    group.add_argument(
        "--position-embedding-type",
        choices=("learned_absolute", "rope", "none"),
        help="position embeddings; default: learned_absolute",
    )
    group.add_argument(
        "--use-rotary-position-embeddings",
        action="store_const",
        const="rope",
        dest="position_embedding_type",
        help="the same as --position-embedding-type rope",
    )
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), help="norm layers; default: LayerNorm")
    group.add_argument("--swiglu", action="store_true", help="gated MLPs with SiLU")
    group.add_argument("--quick-geglu", action="store_true", help="gated MLPs with gpt-oss's activation")
    group.add_argument("--disable-bias-linear", action="store_true", help="no biases in linear layers")
    group.add_argument(
        "--add-qkv-bias", action="store_true", help="a bias in the QKV projection, even with --disable-bias-linear"
    )
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="a separate output layer")
    group.add_argument("--qk-layernorm", action="store_true", help="norms on queries and keys")
    group.add_argument(
        "--softmax-type",
        choices=("vanilla", "learnable"),
        help="learnable: a score of each head that no value belongs to, as the sinks of gpt-oss; default: vanilla",
    )
    group.add_argument(
        "--qk-norm-over-heads",
        action="store_true",
        help="norms of queries and keys over all heads together, as in MiniMax-M2",
    )
    group.add_argument(
        "--attention-output-gate", action="store_true", help="a gate on every value of attention, as in Qwen3-Next"
    )
    group.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        help="layers of Megatron-Core sides; default: local",
    )
    precision = parser.add_mutually_exclusive_group()
    for flag, dtype in (("--bf16", Dtype.BF16), ("--fp16", Dtype.FP16), ("--fp32", Dtype.FP32)):
        precision.add_argument(
            flag, action="store_const", const=dtype, dest="dtype", help=f"{dtype.value} parameters; default: --bf16"
        )


def _add_expert_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("mixture of experts")
    for name, text in (
        ("num-experts", "routed experts per MoE layer; default: none, only dense MLPs"),
        ("moe-router-topk", "experts per token; default: 2, or all where there are fewer"),
        ("moe-ffn-hidden-size", "width of a routed expert; default: --ffn-hidden-size"),
        ("moe-shared-expert-intermediate-size", "width of the shared experts together; default: none"),
        ("moe-latent-size", "width that routed experts work in, between projections; default: --hidden-size"),
    ):
        most = limits.MAX_EXPERTS if name in ("num-experts", "moe-router-topk") else limits.MAX_SIZE
        group.add_argument(f"--{name}", type=flag_types.up_to(most), metavar="N", help=text)
    group.add_argument(
        "--moe-layer-freq",
        type=flag_types.layer_frequency,
        metavar="FREQ",
        help="which layers have experts: every N-th, or a list like ([0]*1+[1]*60); default: 1",
    )
    group.add_argument(
        "--moe-router-enable-expert-bias", action="store_true", help="an expert bias in the router, in float32"
    )
    group.add_argument(
        "--moe-shared-expert-gate", action="store_true", help="a gate that weighs the shared experts, as in Qwen3-Next"
    )
    group.add_argument("--moe-grouped-gemm", action="store_true", help="experts as a grouped GEMM, not one MLP each")


def _add_latent_attention_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("multi-latent attention")
    group.add_argument(
        "--multi-latent-attention", action="store_true", help="multi-latent attention, as in DeepSeek-V2"
    )
    for name, text in (
        ("q-lora-rank", "rank of the queries; default: one full projection"),
        ("kv-lora-rank", "rank of keys and values; default: 32"),
        ("qk-head-dim", "width of a query or key head; default: 128"),
        ("qk-pos-emb-head-dim", "width of the rotary part of a query or key head; default: 64"),
        ("v-head-dim", "width of a value head; default: 128"),
    ):
        group.add_argument(f"--{name}", type=flag_types.up_to(limits.MAX_SIZE), metavar="N", help=text)


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The model that the flags describe. Raises UsageError where they are incomplete or contradict each other."""
    _check_required(args)
    _check_contradictions(args)
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.kv_channels is None and hidden % heads and not args.multi_latent_attention:  # whose heads have own widths
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
        swiglu=args.swiglu or args.quick_geglu,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qk_layernorm=args.qk_layernorm,
        mla=_latent_attention(args),
        experts=_experts(args, ffn),
        mtp_num_layers=args.mtp_num_layers or 0,
        qk_norm_over_heads=args.qk_norm_over_heads,
        attention_sinks=args.softmax_type == "learnable",
        quick_geglu=args.quick_geglu,
        delta_net=delta_net(args),
        attention_output_gate=args.attention_output_gate,
    )


def check_no_shape(args: argparse.Namespace) -> None:
    """Raise UsageError where flags describe a model although `--model-provider` builds its own."""
    parser = FlagParser(add_help=False)
    add_model_flags(parser)
    described = [name for name, value in vars(parser.parse_flags([])).items() if getattr(args, name) != value]
    described += [name for name in ("model", "hf_config") if getattr(args, name) is not None]
    if described:
        raise UsageError(f"{_flags(described[:1])} contradicts --model-provider, which builds a model of its own")


def _check_required(args: argparse.Namespace) -> None:
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if getattr(args, name) is None]
    if missing:
        presets = ", ".join(yaml_files.names("models"))
        raise UsageError(f"{_flags(missing)} missing: describe the model, or choose one with --model ({presets})")


def _check_contradictions(args: argparse.Namespace) -> None:
    if getattr(args, "no-position-embedding", False) and args.position_embedding_type != "rope":
        # The rule of Megatron-LM's arguments.py, where the flag is the default of rotary position embeddings.
        raise UsageError(
            "--no-position-embedding needs --position-embedding-type rope: give it, or none in place of both"
        )
    for allowed, flags, remedy in (
        (args.num_experts is not None, EXPERT_FLAGS, "needs --num-experts"),
        (args.multi_latent_attention, LATENT_FLAGS, "needs --multi-latent-attention"),
        (
            not args.multi_latent_attention,
            GROUP_FLAGS,
            "contradicts --multi-latent-attention, which has no query groups",
        ),
        (not (args.multi_latent_attention and args.softmax_type == "learnable"), ("softmax_type",), SINKS),
        (not args.swiglu, ("quick_geglu",), "contradicts --swiglu: give one of them"),
        (args.experimental_attention_variant, DELTA_NET_FLAGS, "needs --experimental-attention-variant"),
        (
            not (args.multi_latent_attention and args.experimental_attention_variant),
            ("experimental_attention_variant",),
            "contradicts --multi-latent-attention: leave one of them out",
        ),
        (not args.multi_latent_attention, ("attention_output_gate",), "contradicts --multi-latent-attention"),
        (
            args.moe_shared_expert_intermediate_size,
            ("moe_shared_expert_gate",),
            "needs --moe-shared-expert-intermediate-size",
        ),
        (args.qk_layernorm, NORM_FLAGS, "needs --qk-layernorm"),
        (args.normalization == "RMSNorm", NORM_FLAGS, "needs --normalization RMSNorm"),
        (not args.multi_latent_attention, NORM_FLAGS, "contradicts --multi-latent-attention, which has latent norms"),
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
        raise UsageError(
            f"--moe-router-topk {topk} is more than the {args.num_experts} experts there are: give --moe-router-topk "
            f"{args.num_experts}"
        )
    return Experts(
        num_experts=args.num_experts,
        topk=topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or ffn,
        shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size,
        layers=_expert_layers(args),
        expert_bias=args.moe_router_enable_expert_bias,
        grouped_gemm=args.moe_grouped_gemm,
        latent_size=args.moe_latent_size,
        shared_gate=args.moe_shared_expert_gate,
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
