"""From a command line to a run: flags -> validated Scenario -> dry run or benchmark -> exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from refit.cli.flags import full_parser, recorded_flags
from refit.cli.launch import check_launch, rank_variables
from refit.cli.model_flags import check_no_shape, model_shape, wide_experts_note, without_unbuildable_biases
from refit.cli.presets import load_preset
from refit.config.clusters import load_cluster
from refit.config.layout import Layout
from refit.config.scenario import Engine, Method, Mode, Scenario, Verify
from refit.config.shape import ModelShape
from refit.errors import RefitError, UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.report.console import show, show_error
from refit.report.dry_run import dry_run_text


@dataclass(frozen=True, slots=True)
class Request:
    """A scenario and how to treat it; `dry_run` None runs it for real."""

    scenario: Scenario
    dry_run: DryRunOptions | None
    gpus_per_node: int


def main(argv: Sequence[str]) -> int:
    """Run the command line and return this process's exit code. Errors meant for the user are printed once.

    What every rank finds out alike ends in an error code on rank 0 alone, so that a launcher reports one failure.
    """
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        code = _run(parse(argv), first)
    except UsageError as error:
        if first:
            show_error(str(error))
        code = int(error.exit_code)
    except RefitError as error:  # may be this node's alone: say so here, and end the job
        if os.environ.get("LOCAL_RANK", "0") == "0":
            show_error(str(error))
        return int(error.exit_code)
    return code if first else 0


def _run(request: Request, first: bool) -> int:
    if request.dry_run is not None:
        if first:
            show(dry_run_text(dry_run(request.scenario, request.dry_run)))
        return 0
    os.environ.update(rank_variables(os.environ))
    check_launch(request.scenario, os.environ, request.gpus_per_node)
    # Imported here: a dry run needs neither torch nor Megatron.
    from refit.bench.runner import run

    return run(request.scenario)


def parse(argv: Sequence[str]) -> Request:
    """Read a command line. Raises UsageError, in one line, for anything that cannot be honoured."""
    args = read_flags(argv)
    if args.num_gpus is not None and not args.dry_run:
        raise UsageError("--num-gpus needs --dry-run: a run goes by the ranks that torchrun starts")
    scenario = _scenario(args)
    options = DryRunOptions(args.num_gpus, args.gpus_per_node, scenario.cluster)
    return Request(scenario, options if args.dry_run else None, args.gpus_per_node)


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, over those of its preset. Raises UsageError for what no flag takes."""
    parser = full_parser()
    args = parser.parse_flags(argv)
    return args if args.model is None else parser.parse_flags(argv, load_preset(args.model))


def _scenario(args: argparse.Namespace) -> Scenario:
    if args.refit_method is None and not args.dry_run:
        raise UsageError(f"--refit-method missing: choose one of {', '.join(method.value for method in Method)}")
    source, destination = layouts(args)
    model, notes = _model(args, (source, destination))
    return Scenario(
        model=model,
        source=source,
        destination=destination,
        mode=Mode(args.refit_mode),
        method=Method(args.refit_method or Method.NCCL),
        engine=Engine(args.refit_engine),
        num_warmup=args.num_benchmark_warmup,
        num_iterations=args.num_benchmark_iterations,
        verify=Verify(args.verify),
        check_forward=args.check_forward,
        profile=args.profile_refit,
        staging_bytes=args.staging_mib << 20,
        timeout_s=args.timeout,
        transformer_impl=args.transformer_impl or "local",
        model_name=args.model,
        model_provider=args.model_provider,
        output_dir=args.output_dir,
        recorded=recorded_flags(args),
        notes=notes,
        device=_device(args),
        nvshmem_buffers=args.nvshmem_buffers,
        nvshmem_force_put=args.nvshmem_force_put,
        cluster=load_cluster(args.cluster) if args.cluster else None,
        run_name=args.run_name,
    )


def _device(args: argparse.Namespace) -> str | None:
    """Raises UsageError where the method moves no weights there."""
    only = {"nccl": "cuda", "nvshmem": "cuda", "shm": "cpu"}.get(args.refit_method)
    if args.device is not None and only not in (None, args.device):
        raise UsageError(
            f"--refit-method {args.refit_method} moves weights on {only} only: leave --device {args.device} out, "
            "or use --refit-method gloo"
        )
    device: str | None = args.device
    return device


def layouts(args: argparse.Namespace) -> tuple[Layout, Layout]:
    """Source and destination; sizes the destination does not give are the source's, as in Megatron-LM, but ETP.

    Raises UsageError for ranks that cannot be divided so. Whether the model can be is not looked at.
    """
    tp = args.tensor_model_parallel_size or 1
    source = _layout(
        "source",
        tp=tp,
        ep=args.expert_model_parallel_size or 1,
        etp=args.expert_tensor_parallel_size or tp,
        pp=args.pipeline_model_parallel_size or 1,
        world_size=args.source_world_size,
        first_stage_layers=args.decoder_first_pipeline_num_layers,
        last_stage_layers=args.decoder_last_pipeline_num_layers,
    )
    tp = args.rl_inference_tensor_model_parallel_size or source.tp
    destination = _layout(
        "destination",
        tp=tp,
        ep=args.rl_inference_expert_model_parallel_size or source.ep,
        etp=args.rl_inference_expert_tensor_model_parallel_size or tp,
        pp=args.rl_inference_pipeline_model_parallel_size or source.pp,
        world_size=args.destination_world_size,
        first_rank=0 if Mode(args.refit_mode) is Mode.COLLOCATED else source.world_size,
        first_stage_layers=args.rl_inference_decoder_first_pipeline_num_layers,
        last_stage_layers=args.rl_inference_decoder_last_pipeline_num_layers,
    )
    return source, destination


def _layout(
    side: str,
    *,
    tp: int,
    ep: int,
    etp: int,
    pp: int,
    world_size: int | None,
    first_rank: int = 0,
    first_stage_layers: int | None,
    last_stage_layers: int | None,
) -> Layout:
    if pp == 1 and (first_stage_layers or last_stage_layers):
        raise UsageError(
            f"{side}: layers are given for the first or last pipeline stage, but there is one stage: raise PP"
        )
    try:
        return Layout(tp, ep, etp, pp, world_size or tp * ep * pp, first_rank, first_stage_layers, last_stage_layers)
    except UsageError as error:
        flag = f"--{side}-world-size"
        raise UsageError(f"{side}: {error} ({flag})") from None


def _model(args: argparse.Namespace, layouts: tuple[Layout, Layout]) -> tuple[ModelShape | None, tuple[str, ...]]:
    """The model, checked against both layouts, and what the user should know of it."""
    if args.model_provider is not None:
        check_no_shape(args)
        return None, ()
    shape, bias_note = without_unbuildable_biases(model_shape(args), layouts)
    for layout, side in zip(layouts, ("source", "destination"), strict=True):
        shape.check_layout(layout, side)
        if args.padded_vocab_size and args.padded_vocab_size % layout.tp:
            raise UsageError(
                f"{side}: --padded-vocab-size {args.padded_vocab_size} cannot be divided by TP size {layout.tp}: "
                "give a multiple of it, or --vocab-size"
            )
    return shape, tuple(note for note in (bias_note, wide_experts_note(args, shape)) if note)
