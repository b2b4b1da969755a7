"""The flags of the destination's own dtype, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses

from refit.cli import flag_types
from refit.cli.flag_parser import FlagParser
from refit.config.quantisation import BLOCK_FORMATS, KEPT, Place, Quantisation
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.errors import UsageError


def add_quantisation_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("inference dtype")
    rules = "; ".join(f"{name}: {', '.join(block.rules)}" for name, block in BLOCK_FORMATS.items())
    group.add_argument(
        "--rl-inference-dtype",
        choices=("bf16", *BLOCK_FORMATS),
        help="destination: bf16, or FP8 codes (e4m3) with a scale per block of 128x128 or 1x32; default: the source's",
    )
    group.add_argument(
        "--fp8-scale-rule",
        choices=[rule for block in BLOCK_FORMATS.values() for rule in block.rules],
        help=f"how a block's scale follows from its largest value; default: the first of its dtype ({rules})",
    )
    group.add_argument(
        "--fp8-keep-bf16",
        type=flag_types.key_parts,
        metavar="PART[,PART]",
        help=f"tensors with one of these in their keys stay BF16; default: {','.join(KEPT)}",
    )
    group.add_argument(
        "--quantise",
        choices=[place.value for place in Place],
        help="which side quantises; auto: the source where it holds whole blocks, else the destination; default: auto",
    )


def with_inference_dtype(side: SideSpec, args: argparse.Namespace) -> SideSpec:
    """The destination in its own dtype. Raises UsageError for flags of FP8 without it, and where it cannot be FP8."""
    dtype = args.rl_inference_dtype
    check_no_settings(args)
    if dtype is None:
        return side
    if side.dtype is None:
        raise UsageError(f"--rl-inference-dtype {dtype} contradicts --model-provider, which chooses the dtype")
    if dtype not in BLOCK_FORMATS:
        return dataclasses.replace(side, dtype=Dtype.BF16)
    if side.dtype is not Dtype.BF16:
        raise UsageError(f"--rl-inference-dtype {dtype} quantises BF16 weights, the source has {side.dtype.value}")
    if args.autocast:
        raise UsageError(
            f"--rl-inference-dtype {dtype} quantises BF16 weights, with --autocast they are float32: leave one out"
        )
    if "refit" not in args.measure:
        raise UsageError(
            f"--rl-inference-dtype {dtype} needs a refit: forward passes run on dequantised weights, whose times are "
            "those of BF16: add refit to --measure, or leave the dtype out"
        )
    rule = args.fp8_scale_rule or next(iter(BLOCK_FORMATS[dtype].rules))
    settings = {"kept": args.fp8_keep_bf16, "place": args.quantise and Place(args.quantise)}
    given = {name: value for name, value in settings.items() if value is not None}
    return dataclasses.replace(side, quantisation=Quantisation(dtype, rule, **given))


def check_no_settings(args: argparse.Namespace) -> None:
    """Raise UsageError for settings of FP8 without an FP8 dtype."""
    if args.rl_inference_dtype in BLOCK_FORMATS:
        return
    for flag, value in (
        ("--fp8-scale-rule", args.fp8_scale_rule),
        ("--fp8-keep-bf16", args.fp8_keep_bf16),
        ("--quantise", args.quantise),
    ):
        if value is not None:
            raise UsageError(f"{flag} needs --rl-inference-dtype {' or '.join(BLOCK_FORMATS)}")
