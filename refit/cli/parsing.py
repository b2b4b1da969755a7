"""Turns a command line into a validated Scenario."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refit.cli.flags import full_parser, recorded_flags
from refit.cli.model_flags import (
    check_no_shape,
    check_parameters,
    model_shape,
    wide_experts_note,
    without_unbuildable_biases,
)
from refit.cli.presets import config_flags, load_preset
from refit.cli.step_flags import runs_steps, step_settings
from refit.config.clusters import load_cluster
from refit.config.flag_names import (
    FORMAT_FLAGS,
    LAYERS_PER_CHUNK_FLAGS,
    OPTION_FLAGS,
    PIPELINE_LAYOUT_FLAGS,
    SIZE_FLAGS,
    size_flag,
)
from refit.config.layout import Layout
from refit.config.registry import AUTO, ENGINES, FORMATS, MEASUREMENTS, METHODS, load
from refit.config.scenario import Mode, Scenario, Verify
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions
from refit.predict.families.config_json import read_config_json
from refit.predict.sides import check_side
from refit.results.stats import LEAST_FOR_INTERVAL

DRY_RUN_METHOD = "nccl"
"""The method of a dry run without `--refit-method`. No figure of a dry run depends on it."""


@dataclass(frozen=True, slots=True)
class Request:
    """A scenario and how to run it. `dry_run` is None for a real run, `as_json` asks for its figures as JSON."""

    scenario: Scenario
    dry_run: DryRunOptions | None
    gpus_per_node: int
    as_json: bool = False


def parse(argv: Sequence[str]) -> Request:
    """Read a command line. Raises UsageError, in one line, for anything that cannot be honoured."""
    args = read_flags(argv)
    if args.num_gpus is not None and not args.dry_run:
        raise UsageError("--num-gpus needs --dry-run: a run goes by the ranks that torchrun starts")
    if args.json and not args.dry_run:
        raise UsageError("--json needs --dry-run: a run writes its result file as JSON")
    scenario = _scenario(args)
    options = DryRunOptions(args.num_gpus, args.gpus_per_node, scenario.cluster)
    return Request(scenario, options if args.dry_run else None, args.gpus_per_node, args.json)


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, over those of its preset. Raises UsageError for unknown or invalid flags."""
    parser = full_parser()
    args = parser.parse_flags(argv)
    if args.hf_config is not None:
        if args.model is not None:
            raise UsageError(f"--model {args.model} contradicts --hf-config, which describes a model: give one of them")
        config = read_config_json(args.hf_config)
        args = parser.parse_flags(argv, config_flags(config))
        args.hf_config = config
    elif args.model is not None:
        args = parser.parse_flags(argv, load_preset(args.model))
    return args


def read_sides(args: argparse.Namespace) -> tuple[SideSpec, SideSpec]:
    """Source and destination. Sizes not given for the destination are the source's, except ETP, which is its own TP.

    Raises UsageError where the sizes do not divide the ranks. Whether the model can be sharded this way is not checked.
    """
    source = _side("source", args, first_rank=0)
    if not any("destination" in MEASUREMENTS[name].sides for name in args.measure):
        _check_no_destination(args)
        return source, source
    first_rank = 0 if Mode(args.refit_mode) is Mode.COLLOCATED else source.world_size
    return source, _side("destination", args, first_rank=first_rank, like=source.layout)


def read_mode(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> Mode:
    """The mode that was asked for; collocated where no measurement uses the destination."""
    return Mode.COLLOCATED if sides[0] == sides[1] else Mode(args.refit_mode)


def _check_no_destination(args: argparse.Namespace) -> None:
    """Raise UsageError for a size of the destination where no measurement uses it."""
    flags = (names[1] for names in (*SIZE_FLAGS.values(), LAYERS_PER_CHUNK_FLAGS, PIPELINE_LAYOUT_FLAGS))
    given = next((flag for flag in flags if getattr(args, _attribute(flag)) is not None), None)
    if given is not None:
        raise UsageError(f"--{given} is for the destination, which --measure {','.join(args.measure)} does not use")


def _side(name: str, args: argparse.Namespace, *, first_rank: int, like: Layout | None = None) -> SideSpec:
    """The side `name`. Sizes that are not given are those of `like`."""
    place = name == "destination"
    given_format = getattr(args, _attribute(FORMAT_FLAGS[place]))
    # A model provider chooses the dtype of what it builds.
    dtype = None if args.model_provider is not None else args.dtype or Dtype.BF16
    spec = SideSpec(
        _layout(name, args, given_format, like, first_rank=first_rank),
        format=given_format,
        dtype=dtype,
        transformer_impl=args.transformer_impl or "local",
    )
    return dataclasses.replace(spec, **_options(name, args, given_format))


def _options(name: str, args: argparse.Namespace, given_format: str) -> dict[str, Any]:
    """The field of SideSpec with the settings of its format alone, from its flags. Empty for a format without any.

    Raises UsageError for a flag of another format.
    """
    place = name == "destination"
    given: dict[str, dict[str, int]] = {}
    for format_name, fields in OPTION_FLAGS.items():
        values = {field: getattr(args, _attribute(flags[place])) for field, flags in fields.items()}
        given[format_name] = {field: value for field, value in values.items() if value is not None}
        if given[format_name] and format_name != given_format:
            flag = fields[next(iter(given[format_name]))][place]
            raise UsageError(f"--{flag} needs --{FORMAT_FLAGS[place]} {format_name}, the {name} is {given_format}")
    options = FORMATS[given_format].options
    return {given_format: load(options)(**given.get(given_format, {}))} if options is not None else {}


def _attribute(flag: str) -> str:
    return flag.replace("-", "_")


def _layout(name: str, args: argparse.Namespace, given_format: str, like: Layout | None, *, first_rank: int) -> Layout:
    given = {size: getattr(args, _attribute(flags[name == "destination"])) for size, flags in SIZE_FLAGS.items()}
    axes = FORMATS[given_format].axes
    for size in ("pp", "ep", "etp"):
        if size not in axes and (given[size] or 1) > 1:
            flag = size_flag(name, size)
            raise UsageError(f"{flag} {given[size]}: {given_format} sides have {', '.join(axes)} only, leave it out")
    tp = given["tp"] or (like.tp if like is not None else 1)
    defaults = {"tp": tp, "ep": like.ep if like else 1, "etp": tp, "pp": like.pp if like else 1}
    sizes = {size: (given[size] or default) if size in axes else 1 for size, default in defaults.items()}
    stages = {size: given[size] for size in ("first_stage_layers", "last_stage_layers")}
    if sizes["pp"] == 1 and any(stages.values()):
        raise UsageError(
            f"{name}: layers are given for the first or last pipeline stage, but there is one stage: raise PP"
        )
    world_size = given["world_size"] or sizes["tp"] * sizes["ep"] * sizes["pp"]
    try:
        layout = Layout(**sizes, world_size=world_size, first_rank=first_rank, **stages)  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(f"{name}: {error} ({size_flag(name, 'world_size')})") from None
    try:
        vpp, chunks = _chunks(name, args, layout, given["vpp"])
        return dataclasses.replace(layout, vpp=vpp, chunk_sizes=chunks)
    except UsageError as error:
        raise UsageError(f"{name}: {error} ({size_flag(name, 'pp')})") from None


def _chunks(
    side: str, args: argparse.Namespace, layout: Layout, given: int | None
) -> tuple[int, tuple[int, ...] | None]:
    """The model chunks of a rank, and the layers of every chunk where they are given one by one."""
    name = PIPELINE_LAYOUT_FLAGS[side == "destination"]
    chunks: tuple[int, ...] | None = getattr(args, name.replace("-", "_"))
    if chunks is None:
        return _virtual_size(side, args, layout, given), None
    others = (given, getattr(args, LAYERS_PER_CHUNK_FLAGS[side == "destination"].replace("-", "_")))
    if any((*others, layout.first_stage_layers, layout.last_stage_layers)):
        raise UsageError(f"--{name} says how layers are split, and another flag does too: give one of them")
    if len(chunks) % layout.pp:
        raise UsageError(f"--{name} has {len(chunks)} stages, which cannot be divided over PP {layout.pp}")
    return len(chunks) // layout.pp, chunks


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
        raise UsageError(f"{flag} contradicts {instead} {given}: give one of them")
    uneven = layout.first_stage_layers or layout.last_stage_layers
    if uneven is not None:
        raise UsageError(f"{flag} contradicts {uneven} layers on an uneven stage: give {instead}")
    if args.num_layers is None:
        raise UsageError(f"{flag} needs --num-layers: give {instead}")
    if args.num_layers % (layout.pp * layers):
        raise UsageError(f"{args.num_layers} layers cannot be divided into chunks of {layers} on PP size {layout.pp}")
    return int(args.num_layers // (layout.pp * layers))


def _scenario(args: argparse.Namespace) -> Scenario:
    if args.refit_method is None and not args.dry_run:
        raise UsageError(f"--refit-method missing: choose one of {', '.join([*METHODS, AUTO])}")
    source, destination = sides = read_sides(args)
    model, notes = _model(args, sides)
    _check_engines(args.refit_engine, sides)
    recorded = recorded_flags(args)
    steps = step_settings(args, sides, model, recorded)
    if args.check_forward and model is not None:
        _check_forward_flags(args, model)
    return Scenario(
        model=model,
        source=source,
        destination=destination,
        mode=read_mode(args, sides),
        method=args.refit_method or DRY_RUN_METHOD,
        engines=args.refit_engine,
        measurements=args.measure,
        num_warmup=args.num_benchmark_warmup,
        num_iterations=args.num_benchmark_iterations,
        max_iterations=_max_iterations(args),
        verify=Verify(args.verify),
        check_forward=args.check_forward,
        profile=args.profile_refit,
        staging_bytes=args.staging_mib << 20,
        timeout_s=args.timeout,
        model_name=str(args.hf_config.path) if args.hf_config is not None else args.model,
        model_provider=args.model_provider,
        output_dir=args.output_dir,
        recorded=recorded,
        notes=notes,
        device=_device(args),
        one_sided_buffers=args.one_sided_buffers,
        nvshmem_force_put=args.nvshmem_force_put,
        cluster=load_cluster(args.cluster) if args.cluster else None,
        run_name=args.run_name,
        steps=steps,
    )


def _max_iterations(args: argparse.Namespace) -> int | None:
    """Raises UsageError where no interval can be formed, or where fewer refits are allowed than are asked for."""
    most: int | None = args.repeat_until_stable
    least = max(args.num_benchmark_iterations, LEAST_FOR_INTERVAL)
    if most is not None and most < least:
        raise UsageError(
            f"--repeat-until-stable {most} ends before {least} timed refits, the fewest that "
            f"{'an interval needs' if least == LEAST_FOR_INTERVAL else '--num-benchmark-iterations asks for'}: raise it"
        )
    return most


def _device(args: argparse.Namespace) -> str | None:
    """Raises UsageError where the method moves no weights there."""
    device: str | None = args.device
    if device is None or args.refit_method in (None, AUTO) or device in METHODS[args.refit_method].devices:
        return device
    raise UsageError(
        f"--refit-method {args.refit_method} moves weights on {METHODS[args.refit_method].device} only: "
        f"leave --device {device} out, or use --refit-method gloo"
    )


def _check_engines(engines: Sequence[str], sides: Sequence[SideSpec]) -> None:
    for name in engines:
        formats = ENGINES[name].formats
        other = next((side.format for side in sides if formats is not None and side.format not in formats), None)
        if other is not None:
            raise UsageError(
                f"--refit-engine {name} refits {' and '.join(formats or ())} sides only, one side is {other}: "
                "leave it out"
            )
        chunks = max(side.layout.vpp for side in sides)
        if ENGINES[name].single_chunk and chunks > 1:
            raise UsageError(
                f"--refit-engine {name} refits 1 model chunk per rank, virtual pipeline stages make {chunks}: "
                "leave one of them out"
            )


def _check_forward_flags(args: argparse.Namespace, model: ModelShape) -> None:
    """Raise UsageError for a flag that a plain refit only records, and that the forward pass would not honour."""
    biased = model.experts is not None and model.experts.expert_bias
    runs_with = {"moe-router-score-function": "sigmoid" if biased else "softmax"}
    if not runs_steps(args.measure):
        runs_with["moe-token-dispatcher-type"] = "allgather"
    for name, value in runs_with.items():
        given = getattr(args, name, value)
        if given != value:
            raise UsageError(
                f"--{name} {given} contradicts --check-forward, whose forward pass runs with {value}: leave one out"
            )


def _model(args: argparse.Namespace, sides: tuple[SideSpec, SideSpec]) -> tuple[ModelShape | None, tuple[str, ...]]:
    """The model, checked against both sides, and notes for the user."""
    if args.model_provider is not None:
        check_no_shape(args)
        _check_provider_formats(sides)
        return None, ()
    shape, bias_note = without_unbuildable_biases(model_shape(args), [side.layout for side in sides])
    check_parameters(shape, [side.layout for side in sides])
    for side, name in zip(sides, ("source", "destination"), strict=True):
        check_side(shape, side, name)
        if args.padded_vocab_size and args.padded_vocab_size % side.layout.tp:
            raise UsageError(
                f"{name}: --padded-vocab-size {args.padded_vocab_size} cannot be divided by TP size {side.layout.tp}: "
                "give a multiple of it, or --vocab-size"
            )
    config_notes = args.hf_config.notes if args.hf_config is not None else ()
    return shape, (*config_notes, *(note for note in (bias_note, wide_experts_note(args, shape)) if note))


def _check_provider_formats(sides: Sequence[SideSpec]) -> None:
    other = next((side.format for side in sides if not FORMATS[side.format].takes_provider), None)
    if other is not None:
        raise UsageError(f"--model-provider builds a Megatron-Core model, one side is {other}: describe it with flags")
