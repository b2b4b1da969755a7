"""The flags of models of transformers, which FSDP2 and AutoTP sides are: their attention, and autocast."""

from __future__ import annotations

import argparse
import dataclasses

from refit.config.registry import FORMATS
from refit.config.shape import Dtype
from refit.config.side import ATTN_IMPLS, DEFAULT_ATTN_IMPL, SideSpec
from refit.errors import UsageError


def add_transformers_flags(group: argparse._ArgumentGroup) -> None:
    formats = " and ".join(_formats())
    group.add_argument(
        "--attn-impl",
        choices=ATTN_IMPLS,
        help=f"both sides, {formats} only: transformers' attn_implementation; default: {DEFAULT_ATTN_IMPL}",
    )
    group.add_argument(
        "--autocast",
        action="store_true",
        help=f"source, {formats} only: float32 weights, computed with in --bf16 or --fp16 by torch.autocast",
    )


def check_transformers_flags(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> None:
    """Raise UsageError for these flags without a side that they are for, and where they contradict the dtype."""
    formats, source = " and ".join(_formats()), sides[0].format
    if args.attn_impl is not None and all(side.attn_impl is None for side in sides):
        others = " and ".join(dict.fromkeys(side.format for side in sides))
        raise UsageError(
            f"--attn-impl {args.attn_impl} is for models of transformers ({formats}), here are {others} sides: leave "
            "it out, Megatron-Core's attention is that of --transformer-impl"
        )
    if args.attn_impl == "flash_attention_2" and args.dtype is Dtype.FP32:
        raise UsageError("--attn-impl flash_attention_2 computes in 16 bits only: give --bf16 or --fp16, not --fp32")
    if not args.autocast:
        return
    if source not in _formats():
        raise UsageError(
            f"--autocast is for sources of transformers ({formats}), the source is {source}: leave it out, "
            "Megatron-Core has float32 copies of 16-bit weights in its optimizer"
        )
    if args.dtype is Dtype.FP32:
        raise UsageError("--autocast computes in 16 bits: give --bf16 or --fp16, not --fp32")


def with_transformers_settings(side: SideSpec, args: argparse.Namespace, *, trains: bool) -> SideSpec:
    """The side with its attention and, where it `trains`, autocast. Sides of other libraries stay as they are."""
    if side.format not in _formats():
        return side
    side = dataclasses.replace(side, attn_impl=args.attn_impl or DEFAULT_ATTN_IMPL)
    return dataclasses.replace(side, dtype=Dtype.FP32, autocast=side.dtype) if args.autocast and trains else side


def _formats() -> list[str]:
    return [name for name, row in FORMATS.items() if row.is_transformers]
