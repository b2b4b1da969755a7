"""The flags of both sides, their layouts and formats, and what they mean."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from refit.cli import flag_types
from refit.cli.flag_parser import FlagParser
from refit.cli.layout_text import add_layout_flags
from refit.cli.option_flags import add_option_flag, attribute
from refit.cli.quantisation_flags import with_inference_dtype
from refit.cli.transformers_flags import add_transformers_flags, check_transformers_flags, with_transformers_settings
from refit.config import limits
from refit.config.flag_names import (
    FORMAT_FLAGS,
    LAYERS_PER_CHUNK_FLAGS,
    PIPELINE_LAYOUT_FLAGS,
    SIZE_FLAGS,
    size_flag,
)
from refit.config.layout import Layout
from refit.config.options import Sized, default_sizes, fewest_ranks
from refit.config.pipeline_layout import PipelineLayout
from refit.config.registry import DEFAULT_FORMAT, FORMATS, MEASUREMENTS, load, option_flags
from refit.config.scenario import Mode
from refit.config.shape import Dtype
from refit.config.side import SideSpec
from refit.errors import UsageError


def add_side_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("layouts")
    texts = {
        "tp": ("TP", "1", "the source's"),
        "pp": ("PP", "1", "the source's"),
        "ep": ("EP", "1", "the source's"),
        "etp": ("ETP", "its TP", "its TP"),
        "vpp": ("model chunks on each rank, in interleaved pipeline stages", "1", "1"),
        "first_stage_layers": ("layers on the first stage", "an even split", "an even split"),
        "last_stage_layers": ("layers on the last stage", "an even split", "an even split"),
        "world_size": ("ranks", "PP x lcm(TP, ETP x EP)", "PP x lcm(TP, ETP x EP)"),
    }
    add_layout_flags(group)
    for place, side in enumerate(("source", "destination")):
        for size, flags in SIZE_FLAGS.items():
            text, *defaults = texts[size]
            most = limits.MAX_LAYERS if size.endswith("_layers") else limits.MAX_RANKS
            group.add_argument(
                f"--{flags[place]}",
                type=flag_types.up_to(most),
                metavar="N",
                help=f"{side}: {text}; default: {defaults[place]}",
            )
        group.add_argument(
            f"--{LAYERS_PER_CHUNK_FLAGS[place]}",
            type=flag_types.up_to(limits.MAX_LAYERS),
            metavar="N",
            help=f"{side}: layers of a model chunk, another way to give their number; default: all of a stage",
        )
        group.add_argument(
            f"--{PIPELINE_LAYOUT_FLAGS[place]}",
            type=flag_types.pipeline_layout,
            metavar="TEXT",
            help=f"{side}: layers of every model chunk, like Et*4|t*4|t*3L; default: an even split",
        )
    _add_format_flags(parser)


def _add_format_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("formats")
    for place, side in enumerate(("source", "destination")):
        group.add_argument(
            f"--{FORMAT_FLAGS[place]}",
            choices=[name for name, row in FORMATS.items() if place or not row.destination_only],
            default=DEFAULT_FORMAT,
            help=f"{side}: the library that holds the weights; default: {DEFAULT_FORMAT}",
        )
        for name, row in FORMATS.items():
            for flag in option_flags(row.options).values():
                given = flag.names[place]
                if given is not None:
                    add_option_flag(group, (given,), flag, f"{side}, {name} only: {flag.help}")
    add_transformers_flags(group)


def read_sides(args: argparse.Namespace) -> tuple[SideSpec, SideSpec]:
    """Source and destination. Sizes not given for the destination are the source's, except ETP, which is its own TP.

    Raises UsageError where the sizes do not divide the ranks. Whether the model can be sharded this way is not checked.
    """
    source = read_side("source", args, first_rank=0)
    if any("destination" in MEASUREMENTS[name].sides for name in args.measure):
        first_rank = 0 if Mode(args.refit_mode) is Mode.COLLOCATED else source.world_size
        sides = source, read_side("destination", args, first_rank=first_rank, like=source.layout)
    else:
        _check_no_destination(args)
        sides = source, source
    check_transformers_flags(args, sides)
    _check_transformer_impl(args, sides)
    return sides


def world_size_note(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> str | None:
    """What was assumed where an ETP is given, the number of ranks is not, and Megatron needs fewer."""
    assumed = [
        f"{side.world_size} {name} ranks, {size_flag(name, 'world_size')} {fewest} would do"
        for name, side in zip(("source", "destination"), sides, strict=True)
        if getattr(args, attribute(SIZE_FLAGS["etp"][name == "destination"])) is not None
        and getattr(args, attribute(SIZE_FLAGS["world_size"][name == "destination"])) is None
        and (fewest := fewest_ranks(side.layout)) < side.world_size
    ]
    return f"assumed: TP x EP x PP = {' and '.join(assumed)}: experts fold over TP x DP" if assumed else None


def read_mode(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> Mode:
    """The mode that was asked for; collocated where no measurement uses the destination."""
    return Mode.COLLOCATED if sides[0] == sides[1] else Mode(args.refit_mode)


def _check_transformer_impl(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> None:
    """Raise UsageError for `--transformer-impl` where no side has layers that it chooses."""
    if args.transformer_impl is not None and not any(FORMATS[side.format].has_layer_specs for side in sides):
        others = " and ".join(dict.fromkeys(side.format for side in sides))
        raise UsageError(
            f"--transformer-impl {args.transformer_impl} chooses the layers of Megatron-Core sides, here are {others} "
            "sides: leave it out"
        )


def _check_no_destination(args: argparse.Namespace) -> None:
    """Raise UsageError for a size or dtype of the destination where no measurement uses it."""
    flags = (names[1] for names in (*SIZE_FLAGS.values(), LAYERS_PER_CHUNK_FLAGS, PIPELINE_LAYOUT_FLAGS))
    own = ("rl-inference-dtype", "fp8-scale-rule", "fp8-keep-bf16", "quantise")
    given = next((flag for flag in ("destination", *flags, *own) if getattr(args, attribute(flag)) is not None), None)
    if given is not None:
        raise UsageError(f"--{given} is for the destination, which --measure {','.join(args.measure)} does not use")


def read_side(name: str, args: argparse.Namespace, *, first_rank: int, like: Layout | None = None) -> SideSpec:
    """The side `name`. Sizes that are not given are those of `like`. Raises UsageError as `read_sides`."""
    place = name == "destination"
    given_format = getattr(args, attribute(FORMAT_FLAGS[place]))
    # A model provider chooses the dtype of what it builds.
    dtype = None if args.model_provider is not None else args.dtype or Dtype.BF16
    given = {size: getattr(args, attribute(flags[place])) for size, flags in SIZE_FLAGS.items()}
    stages = {size: given[size] for size in ("first_stage_layers", "last_stage_layers")}
    try:
        sized = _sized(name, args, given_format, given, like)
        layout = Layout(**sized.sizes, first_rank=first_rank, **stages)  # type: ignore[arg-type]
    except UsageError as error:
        text = str(error)
        flag = "" if "--" in text else f" ({size_flag(name, 'world_size')})"
        raise UsageError(f"{name}: {text}{flag}") from None
    if layout.pp == 1 and any(stages.values()):
        raise UsageError(
            f"{name}: layers are given for the first or last pipeline stage, but there is one stage: raise PP"
        )
    try:
        layout = dataclasses.replace(layout, **_chunks(name, args, layout, given["vpp"]))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    spec = SideSpec(layout, format=given_format, dtype=dtype, transformer_impl=args.transformer_impl or "local")
    spec = with_transformers_settings(dataclasses.replace(spec, options=sized.options), args, trains=not place)
    return with_inference_dtype(spec, args) if place else spec


def _sized(
    name: str, args: argparse.Namespace, given_format: str, given: Mapping[str, int | None], like: Layout | None
) -> Sized:
    """The settings of a side's format and its sizes. Raises UsageError where they contradict each other."""
    row, given_options = FORMATS[given_format], _options(name, args, given_format)
    for size in ("pp", "ep", "etp"):
        if size not in row.axes and (given[size] or 1) > 1:
            flag, axes = size_flag(name, size), ", ".join(row.axes)
            raise UsageError(f"{flag} {given[size]}: {given_format} sides have {axes} only, leave {flag} out")
    tp = given["tp"] or (like.tp if like is not None else 1)
    defaults = {"tp": tp, "ep": like.ep if like else 1, "etp": tp, "pp": like.pp if like else 1}
    sizes = {size: (given[size] or default) if size in row.axes else 1 for size, default in defaults.items()}
    if row.options is None:
        return Sized(None, default_sizes(sizes, given))
    sized: Sized = load(row.options).complete(name, given_options, sizes, given)
    return sized


def _options(name: str, args: argparse.Namespace, given_format: str) -> dict[str, Any]:
    """The given settings of the side's format. Raises UsageError for a flag of another format."""
    place = name == "destination"
    given: dict[str, Any] = {}
    for format_name, row in FORMATS.items():
        flags = {field: flag.names[place] for field, flag in option_flags(row.options).items()}
        values = {field: getattr(args, attribute(flag)) for field, flag in flags.items() if flag is not None}
        values = {field: value for field, value in values.items() if value is not None}
        if format_name == given_format:
            given = values
        elif values:
            flag = flags[next(iter(values))]
            raise UsageError(f"--{flag} needs --{FORMAT_FLAGS[place]} {format_name}, the {name} is {given_format}")
    return given


def _chunks(side: str, args: argparse.Namespace, layout: Layout, given: int | None) -> dict[str, Any]:
    """Fields of the layout: a rank's model chunks, and the layers of every chunk where they are given one by one."""
    flag = PIPELINE_LAYOUT_FLAGS[side == "destination"]
    chunks: PipelineLayout | None = getattr(args, attribute(flag))
    if chunks is None:
        return {"vpp": _virtual_size(side, args, layout, given)}
    given_format = getattr(args, attribute(FORMAT_FLAGS[side == "destination"]))
    if "pp" not in FORMATS[given_format].axes:
        raise UsageError(f"--{flag}: {given_format} sides have no pipeline stages: leave --{flag} out")
    pp, vpp, num_stages = layout.pp, size_flag(side, "vpp"), len(chunks.layers)
    uneven = (SIZE_FLAGS[size] for size in ("first_stage_layers", "last_stage_layers"))
    others = [names[side == "destination"] for names in (LAYERS_PER_CHUNK_FLAGS, *uneven)]
    other = next((name for name in others if getattr(args, attribute(name))), None)
    if other is not None:
        raise UsageError(f"--{flag} contradicts --{other}, both say how layers are split: leave --{other} out")
    if num_stages % pp or (pp == 1 and num_stages > 1):
        raise UsageError(
            f"--{flag} has {num_stages} stages, which cannot be those of PP {pp}: give {size_flag(side, 'pp')} "
            f"{num_stages // given if given and num_stages % given == 0 else num_stages}"
        )
    if given is not None and given != num_stages // pp:
        raise UsageError(
            f"--{flag} has {num_stages} stages, {num_stages // pp} on each of PP {pp} ranks, which contradicts "
            f"{vpp} {given}: leave {vpp} out"
        )
    return {"vpp": num_stages // pp, "chunk_sizes": chunks.layers, "chunk_predictions": chunks.predictions}


def _virtual_size(side: str, args: argparse.Namespace, layout: Layout, given: int | None) -> int:
    """The model chunks of a rank: as `given`, or from the layers of a chunk.

    Raises UsageError by the rules of Megatron-LM's arguments.py for the layers of a chunk.
    """
    name, instead = LAYERS_PER_CHUNK_FLAGS[side == "destination"], size_flag(side, "vpp")
    layers: int | None = getattr(args, name.replace("-", "_"))
    if layers is None:
        return given or 1
    flag = f"--{name} {layers}"
    if given is not None:
        raise UsageError(f"{flag} contradicts {instead} {given}: leave --{name} out")
    uneven = layout.first_stage_layers or layout.last_stage_layers
    if uneven is not None:
        raise UsageError(f"{flag} contradicts {uneven} layers on an uneven stage: give {instead}")
    if args.num_layers is None:
        raise UsageError(f"{flag} needs --num-layers: give {instead}")
    if args.num_layers % (layout.pp * layers):
        raise UsageError(f"{args.num_layers} layers cannot be divided into chunks of {layers} on PP size {layout.pp}")
    return int(args.num_layers // (layout.pp * layers))
