"""Layouts as text, as titles print them (`TP8 EP8 PP4`, `vllm TP4 EP16 DP4`), turned into the flags of a side."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping

from refit.cli.flag_parser import FlagParser
from refit.cli.option_flags import attribute
from refit.config.flag_names import (
    FORMAT_FLAGS,
    LAYERS_PER_CHUNK_FLAGS,
    PIPELINE_LAYOUT_FLAGS,
    SIZE_FLAGS,
    size_flag,
)
from refit.config.registry import DEFAULT_FORMAT, FORMATS, option_flags
from refit.config.rows import DATA_PARALLEL
from refit.errors import UsageError

SIDES = ("source", "destination")
EXAMPLES = {"source": "TP8 EP8 PP4", "destination": "vllm TP4 EP16 DP4"}


def add_layout_flags(group: argparse._ArgumentGroup) -> None:
    """`--source` and `--destination`."""
    for side, default in zip(SIDES, ("the flags below", "the flags below, then the source's sizes"), strict=True):
        group.add_argument(
            f"--{side}",
            metavar="LAYOUT",
            help=f"{side}: its layout as text, as in '{EXAMPLES[side]}': a format, where it is not megatron, and "
            f"sizes, which are 1 where they are not given; default: {default}",
        )


def with_layouts(parser: FlagParser, args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the flags that `--source` and `--destination` stand for.

    Raises UsageError for a text that is no layout, and where a flag says otherwise.
    """
    for place, side in enumerate(SIDES):
        text: str | None = getattr(args, side)
        if text is None:
            continue
        given_format: str = getattr(args, attribute(FORMAT_FLAGS[place]))
        words = _words(side, text, None, None if _splits_layers(args, place) else args.num_layers, given_format)
        given = {name: getattr(args, attribute(name)) for name in (word[2:].partition("=")[0] for word in words)}
        args = parser.parse_flags(words, args)
        for name, before in given.items():
            after = getattr(args, attribute(name))
            is_default = before is None or (name in FORMAT_FLAGS and before == DEFAULT_FORMAT)
            if not is_default and before != after:
                raise UsageError(f"--{side} {text!r} contradicts --{name} {before}: leave one of them out")
    return args


def layout_from_text(side: str, text: str, num_gpus: int | None, num_layers: int) -> tuple[str, ...]:
    """The flags of a layout such as `TP8 EP8 PP4` or `fsdp2 TP2`: a format, where it is not Megatron's, and sizes.

    Raises UsageError for other words, a size given twice or one that the format does not have.
    """
    return _words(side, text, num_gpus, num_layers, DEFAULT_FORMAT)


def layout_flags(
    side: str, name: str, sizes: Mapping[str, int], num_gpus: int | None, num_layers: int | None
) -> tuple[str, ...]:
    """The flags of one layout. Sizes that are not given are 1, not the other side's; ETP is then TP.

    Where PP does not divide the layers, the last stage has what the others, rounded up, leave; `num_layers` None leaves
    it to other flags.
    """
    given = {**{size: 1 for size in FORMATS[name].axes if size != "etp"}, **sizes}
    pp = given.get("pp", 1)
    if num_layers is not None and num_layers % pp:
        last = num_layers - (pp - 1) * math.ceil(num_layers / pp)
        given |= {"last_stage_layers": last} if last > 0 else {}
    if num_gpus is not None:
        given["world_size"] = num_gpus
    form = (f"--{FORMAT_FLAGS[side == 'destination']}={name}",) if name != DEFAULT_FORMAT else ()
    return (*form, *(f"{_flag(side, name, size)}={value}" for size, value in given.items()))


def _words(side: str, text: str, num_gpus: int | None, num_layers: int | None, given_format: str) -> tuple[str, ...]:
    words = text.split()
    name = words.pop(0) if words and words[0] in FORMATS else given_format
    place = side == "destination"
    fields = {size.upper(): size for size in FORMATS[name].axes}
    fields |= {"VPP": "vpp"} if "etp" in FORMATS[name].axes else {}
    options = option_flags(FORMATS[name].options)
    fields |= {
        word: field
        for word, field in FORMATS[name].words
        if field == DATA_PARALLEL or options[field].names[place] is not None
    }
    from_zero = [field for field, flag in options.items() if flag.least == 0]
    by_name = {word.lower(): field for word, field in fields.items()}
    sizes: dict[str, int] = {}
    for word in words:
        match = re.fullmatch(r"([A-Za-z]+|\+)0*([1-9][0-9]{0,8}|0)", word)
        field = by_name.get(match[1].lower()) if match else None
        if match is None or field is None or field in sizes or (match[2] == "0" and field not in from_zero):
            known = ", ".join(f"{word}n" for word in fields)
            raise UsageError(f"--{side} {text!r}: {word!r} is not one of {known}, each once, as in {EXAMPLES[side]!r}")
        sizes[field] = int(match[2])
    if not sizes:
        raise UsageError(f"--{side} {text!r} names no size: give some, as in {EXAMPLES[side]!r}")
    replicas = sizes.pop(DATA_PARALLEL, None)
    if replicas is not None:
        num_gpus = replicas * math.prod(sizes.get(size, 1) for size in ("tp", "pp", "replicate_size"))
    return layout_flags(side, name, sizes, num_gpus, None if "vpp" in sizes else num_layers)


def _splits_layers(args: argparse.Namespace, place: int) -> bool:
    """Whether a flag says how layers are split over the stages of a side."""
    uneven = (SIZE_FLAGS[size] for size in ("first_stage_layers", "last_stage_layers", "vpp"))
    flags = (LAYERS_PER_CHUNK_FLAGS, PIPELINE_LAYOUT_FLAGS, *uneven)
    return any(getattr(args, attribute(names[place])) is not None for names in flags)


def _flag(side: str, name: str, size: str) -> str:
    """The flag of a size, or of a setting of the format `name`."""
    if size in SIZE_FLAGS:
        return size_flag(side, size)
    return f"--{option_flags(FORMATS[name].options)[size].names[side == 'destination']}"
