"""Turns a command line into a validated Scenario."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refit.cli.delta_flags import delta_options
from refit.cli.flags import full_parser, recorded_flags
from refit.cli.layout_text import with_layouts
from refit.cli.model_checks import check_parameters, wide_experts_note, without_unbuildable_biases
from refit.cli.model_flags import check_no_shape, model_shape
from refit.cli.option_flags import method_options, unused_flag_notes
from refit.cli.presets import config_flags, give_way, load_preset
from refit.cli.side_flags import read_mode, read_sides, world_size_note
from refit.cli.step_flags import runs_steps, step_settings
from refit.cli.weights_flags import check_weights_flags, measurements
from refit.config.clusters import load_cluster
from refit.config.options import MethodOptions
from refit.config.plugins import load_plugins
from refit.config.registry import AUTO, ENCODINGS, ENGINES, FORMATS, IDENTITY, METHODS, OWN_ENGINE
from refit.config.relay import Relay
from refit.config.scenario import Scenario, Verify
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions
from refit.predict.families.config_json import read_config_json
from refit.predict.sides import check_side, library_notes
from refit.results.stats import LEAST_FOR_INTERVAL

DEFAULT_WARMUP = 2
DRY_RUN_METHOD = next(name for name, row in METHODS.items() if not row.one_sided)
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
    """The flags of a command line, over those of its preset, and what layouts as text stand for.

    Raises UsageError for unknown or invalid flags.
    """
    load_plugins(argv)
    parser = full_parser()
    args = parser.parse_flags(argv)
    given = tuple(word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    if args.source_weights is not None and _describes_nothing(args):
        args.hf_config = Path(args.source_weights)
    if args.hf_config is not None:
        if args.model is not None:
            raise UsageError(f"--model {args.model} contradicts --hf-config, which describes a model: give one of them")
        config = read_config_json(args.hf_config, vars(args))
        args = parser.parse_flags(argv, give_way(config_flags(config), args)[0])
        args.hf_config, args.preset_notes = config, ()
    elif args.model is not None:
        preset, notes = give_way(load_preset(args.model), args)
        args = parser.parse_flags(argv, preset)
        args.preset_notes = notes
    else:
        args.preset_notes = ()
    args.given = given
    return with_layouts(parser, args)


def _describes_nothing(args: argparse.Namespace) -> bool:
    """Whether no flags say which model it is, so that a checkpoint's config.json does."""
    if any(each is not None for each in (args.model, args.hf_config, args.model_provider)):
        return False
    return None in (args.num_layers, args.hidden_size, args.num_attention_heads)  # sizes beside a config.json change it


def _scenario(args: argparse.Namespace) -> Scenario:
    if args.refit_method is None and not args.dry_run:
        raise UsageError(f"--refit-method missing: choose one of {', '.join([*METHODS, AUTO])}")
    source, destination = sides = read_sides(args)
    model, notes = _model(args, sides)
    notes += tuple(f"Rows of the plugin {name} are registered." for name in args.plugin)
    notes += (*args.preset_notes, *filter(None, [world_size_note(args, sides)]))
    notes += tuple(_recorded_notes(args))
    engines = _engines(args)
    _check_engines(engines, sides)
    _check_encoding(args, engines)
    method = args.refit_method or DRY_RUN_METHOD
    own_options = method_options(args, method)
    notes += tuple(unused_flag_notes(args, method))
    _check_running_engine(engines, destination, own_options)
    _check_relay(args, engines)
    recorded = recorded_flags(args)
    notes += check_weights_flags(args, model, sides)
    steps = step_settings(args, sides, model, recorded)
    if args.check_forward and model is not None:
        _check_forward_flags(args, model)
    return Scenario(
        model=model,
        source=source,
        destination=destination,
        mode=read_mode(args, sides),
        method=method,
        engines=engines,
        measurements=measurements(args),
        num_warmup=_num_warmup(args),
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
        ranks_per_gpu=_ranks_per_gpu(args),
        method_options=own_options,
        cluster=load_cluster(args.cluster) if args.cluster else None,
        run_name=args.run_name,
        steps=steps,
        encoding=args.refit_encoding,
        delta=delta_options(args),
        relay=Relay(args.refit_relay),
        source_weights=Path(args.source_weights) if args.source_weights is not None else None,
        write_weights=Path(args.write_weights) if args.write_weights is not None else None,
    )


def _recorded_notes(args: argparse.Namespace) -> Iterator[str]:
    """A line for each flag of the command line that changes nothing, and that is called like one that would."""
    parser = full_parser()
    for name in sorted(set(recorded_flags(args)) & set(args.given)):
        longer = parser.longer(name)
        if longer is not None:
            yield f"--{name} is Megatron-LM's and recorded only, {longer} is what changes this run"


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


def _ranks_per_gpu(args: argparse.Namespace) -> int:
    """Raises UsageError where the method moves no weights on GPUs."""
    shared: int = args.ranks_per_gpu
    devices = ("cuda",) if args.refit_method in (None, AUTO) else METHODS[args.refit_method].devices
    if shared > 1 and (args.device or devices[0]) == "cpu":
        remedy = "give --device cuda" if "cuda" in devices and args.refit_method != AUTO else "leave it out"
        raise UsageError(f"--ranks-per-gpu {shared} places ranks on GPUs, and these are on CPUs: {remedy}")
    return shared


def _check_engines(engines: Sequence[str], sides: Sequence[SideSpec]) -> None:
    for name in engines:
        formats = ENGINES[name].formats
        other = next((side.format for side in sides if formats is not None and side.format not in formats), None)
        if other is not None:
            raise UsageError(
                f"--refit-engine {name} refits {' and '.join(formats or ())} sides only, one side is {other}: "
                "leave it out"
            )
        quantised = next((side.quantisation.dtype for side in sides if side.quantisation is not None), None)
        if quantised is not None and not ENGINES[name].encodes:
            raise UsageError(f"--refit-engine {name} cannot refit to {quantised}: leave one of them out")
        chunks = max(side.layout.vpp for side in sides)
        if ENGINES[name].single_chunk and chunks > 1:
            raise UsageError(
                f"--refit-engine {name} refits 1 model chunk per rank, virtual pipeline stages make {chunks}: "
                "leave one of them out"
            )


def _check_running_engine(engines: Sequence[str], destination: SideSpec, methods: Mapping[str, MethodOptions]) -> None:
    """Raise UsageError where a running engine is needed, or could not see what is written."""
    running = destination.running_engine is not None
    own = next((name for name in engines if ENGINES[name].of_running), None)
    if own is not None and not running:
        raise UsageError(f"--refit-engine {own} updates a running vLLM: give --rl-inference-engine-python")
    moving = next((flag for options in methods.values() if (flag := options.moves_weights)), None)
    if running and moving is not None:
        raise UsageError(f"{moving} gives the weights other memory, which a running vLLM does not see: leave it out")


def _engines(args: argparse.Namespace) -> tuple[str, ...]:
    """Those that were asked for, or this suite's: where it sends changes, beside full refits."""
    if args.refit_engine is not None:
        given: tuple[str, ...] = args.refit_engine
        return given
    compares = ENCODINGS[args.refit_encoding].has_options
    return (OWN_ENGINE, *(name for name, row in ENGINES.items() if compares and row.sends_everything))


def _check_encoding(args: argparse.Namespace, engines: Sequence[str]) -> None:
    """Raise UsageError where nothing is sent, an engine sends the weights as they are, or no refit is the first."""
    encoding = args.refit_encoding
    if encoding == IDENTITY:
        full = next((name for name in engines if ENGINES[name].sends_everything and len(engines) > 1), None)
        if full is not None:
            raise UsageError(f"--refit-engine {full} sends everything, as the others do: give --refit-encoding delta")
        return
    if "refit" not in args.measure:
        raise UsageError(f"--refit-encoding {encoding} needs a refit: add refit to --measure, or leave it out")
    if all(ENGINES[name].sends_everything for name in engines):
        raise UsageError(
            f"--refit-engine {engines[0]} alone leaves --refit-encoding {encoding} out: give refit,{engines[0]}"
        )
    plain = next((name for name in engines if not ENGINES[name].encodes), None)
    if plain is not None:
        raise UsageError(
            f"--refit-engine {plain} sends weights as they are, --refit-encoding {encoding} does not: "
            "leave one of them out"
        )
    least = _least_warmup(args)
    if args.num_benchmark_warmup is not None and args.num_benchmark_warmup < least:
        why = "tries before it chooses" if least > 1 else "sends everything at first"
        raise UsageError(
            f"--num-benchmark-warmup {args.num_benchmark_warmup} < {least}: --refit-encoding {encoding} {why}: "
            f"give {least} or more"
        )


def _num_warmup(args: argparse.Namespace) -> int:
    given: int | None = args.num_benchmark_warmup
    return max(DEFAULT_WARMUP, _least_warmup(args)) if given is None else given


def _least_warmup(args: argparse.Namespace) -> int:
    """The refits that show nothing of how later ones go: the first that sends changes sends everything."""
    row = ENCODINGS[args.refit_encoding]
    return max(int(row.has_options), row.num_to_decide + 1 if row.num_to_decide else 0)


def _check_relay(args: argparse.Namespace, engines: Sequence[str]) -> None:
    """Raise UsageError where nothing is sent, or only by engines with plans of their own."""
    if args.refit_relay == Relay.OFF.value:
        return
    if "refit" not in args.measure:
        raise UsageError(f"--refit-relay {args.refit_relay} needs a refit: add refit to --measure, or leave it out")
    if all(ENGINES[name].is_baseline for name in engines):
        raise UsageError(
            f"--refit-relay {args.refit_relay} is for this suite's plans, --refit-engine {','.join(engines)} "
            "has none of them: add refit to it, or leave the relay out"
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
    notes = (bias_note, wide_experts_note(args, shape), *library_notes(shape, sides))
    return shape, (*config_notes, *(note for note in notes if note))


def _check_provider_formats(sides: Sequence[SideSpec]) -> None:
    other = next((side.format for side in sides if not FORMATS[side.format].takes_provider), None)
    if other is not None:
        raise UsageError(f"--model-provider builds a Megatron-Core model, one side is {other}: describe it with flags")
