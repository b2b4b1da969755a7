"""The flags of gated delta nets, under Megatron-LM's names, and the DeltaNet that they describe."""

from __future__ import annotations

import argparse

from refit.cli import flag_types
from refit.cli.flag_parser import FlagParser
from refit.config import limits
from refit.config.shape import DeltaNet
from refit.errors import UsageError

SIZES = {
    "linear_num_key_heads": (16, "key heads of a delta net"),
    "linear_key_head_dim": (128, "width of a key head of a delta net"),
    "linear_num_value_heads": (32, "value heads of a delta net"),
    "linear_value_head_dim": (128, "width of a value head of a delta net"),
    "linear_conv_kernel_dim": (4, "tokens that a delta net convolves"),
}
"""Flags, with Megatron-Core's defaults and their help."""
DELTA_NET_FLAGS = ("linear_attention_freq", *SIZES)


def add_delta_net_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("gated delta nets")
    group.add_argument(
        "--experimental-attention-variant",
        choices=("gated_delta_net",),
        help="gated delta nets in place of attention in most layers, as in Qwen3-Next; default: none",
    )
    group.add_argument(
        "--linear-attention-freq",
        type=flag_types.layer_frequency,
        metavar="FREQ",
        help="which layers have delta nets: all but every N-th, or a list like ([1]*3+[0]*1)*12; default: none",
    )
    for name, (default, text) in SIZES.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(
            flag, type=flag_types.up_to(limits.MAX_SIZE), metavar="N", help=f"{text}; default: {default}"
        )


def delta_net(args: argparse.Namespace) -> DeltaNet | None:
    """None without any. Raises UsageError where the flags contradict each other."""
    if args.experimental_attention_variant is None:
        return None
    frequency: int | tuple[bool, ...] | None = args.linear_attention_freq
    if frequency is None:
        raise UsageError("--experimental-attention-variant needs --linear-attention-freq: give 4, as Qwen3-Next has it")
    if isinstance(frequency, int):
        frequency = tuple((layer + 1) % frequency > 0 for layer in range(args.num_layers))
    if len(frequency) != args.num_layers:
        raise UsageError(
            f"--linear-attention-freq lists {len(frequency)} layers, the model has {args.num_layers}: list each once"
        )
    key_heads, key_dim, value_heads, value_dim, kernel = (
        getattr(args, name) or default for name, (default, _) in SIZES.items()
    )
    if value_heads % key_heads:
        raise UsageError(
            f"{value_heads} value heads of delta nets cannot be divided by {key_heads} key heads: change "
            "--linear-num-value-heads or --linear-num-key-heads"
        )
    return DeltaNet(key_heads, key_dim, value_heads, value_dim, kernel, frequency)
