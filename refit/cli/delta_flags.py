"""The flags of refits that send what has changed, and what they mean."""

from __future__ import annotations

import argparse

from refit.cli.flag_parser import FlagParser
from refit.config.delta import DeltaOptions, Pattern, Snapshot
from refit.config.registry import ENCODINGS, METHODS
from refit.config.yaml_files import shortened
from refit.errors import UsageError

DEFAULTS = DeltaOptions()


def add_delta_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("changes, with --refit-encoding delta")
    group.add_argument(
        "--delta-changed-share",
        type=share,
        action="append",
        metavar="SHARE",
        help="which share of the weights changes between refits, such as 1%%; given several times, refits of each in "
        f"turn; default: {100 * DEFAULTS.shares[0]:g}%%",
    )
    group.add_argument(
        "--delta-pattern",
        choices=[pattern.value for pattern in Pattern],
        help="what changes together: single elements, rows of matrices, or routed experts, with single elements of "
        f"what is not routed; default: {DEFAULTS.pattern.value}",
    )
    group.add_argument(
        "--delta-snapshot",
        choices=[place.value for place in Snapshot],
        help="where a source on a GPU keeps what it has sent: there, or in pinned memory of the host; default: "
        f"{DEFAULTS.snapshot.value}",
    )


def share(text: str) -> float:
    """`1%` or `0.01`, above 0 up to 1."""
    digits = text.strip().removesuffix("%").strip()
    try:
        number = float(digits)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a share such as 1% or 0.01, got {shortened(text)}") from None
    percent = number if "%" in text else 100 * number
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"must be above 0 % and at most 100 %, got {shortened(text)}")
    return float(f"{percent / 100:.12g}")


def delta_options(args: argparse.Namespace) -> DeltaOptions | None:
    """The settings; None for an encoding that has none. Raises UsageError for flags that it would not use."""
    given = {
        "--delta-changed-share": args.delta_changed_share,
        "--delta-pattern": args.delta_pattern,
        "--delta-snapshot": args.delta_snapshot,
    }
    if not ENCODINGS[args.refit_encoding].has_options:
        users = [name for name, row in ENCODINGS.items() if row.has_options]
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag} needs --refit-encoding {' or '.join(users)}")
        return None
    devices = METHODS[args.refit_method].devices if args.refit_method in METHODS else ("cuda",)
    if args.delta_snapshot == Snapshot.HOST.value and (args.device or devices[0]) == "cpu":
        raise UsageError("--delta-snapshot host is for weights on GPUs, these are in the host's memory: leave it out")
    if {"train-step", "refit"} <= set(args.measure):
        for flag, value in list(given.items())[:2]:
            if value is not None:
                raise UsageError(
                    f"{flag} makes changes up, --measure {','.join(args.measure)} sends those of optimizer steps: "
                    "leave one of them out"
                )
    return DeltaOptions(
        shares=tuple(dict.fromkeys(args.delta_changed_share or DEFAULTS.shares)),
        pattern=Pattern(args.delta_pattern or DEFAULTS.pattern),
        snapshot=Snapshot(args.delta_snapshot or DEFAULTS.snapshot),
    )
