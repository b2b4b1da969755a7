"""Flags of a run: the refit, what is measured, how bytes move, where results go, the dry run."""

from __future__ import annotations

import argparse
from pathlib import Path

from refit.cli import flag_types
from refit.cli.flag_parser import FlagParser
from refit.cli.option_flags import add_option_flag, method_flags
from refit.config import limits, plugins
from refit.config.registry import AUTO, ENCODINGS, ENGINES, IDENTITY, MEASUREMENTS, METHODS, chosen_encodings
from refit.config.relay import Relay
from refit.config.scenario import Mode, Verify
from refit.results.stats import CONFIDENCE, STABLE_WIDTH

DEFAULT_REPEATS = 200
"""Most timed refits of `--repeat-until-stable` without a number."""


def add_refit_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("refit")
    _add_model_sources(group)
    _add_ways_to_refit(group)


def _add_model_sources(group: argparse._ArgumentGroup) -> None:
    """What describes the model and both sides, and the files of their weights."""
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a preset of configs/models, or a YAML file; other flags override it; default: none",
    )
    group.add_argument(
        "--hf-config",
        type=Path,
        metavar="PATH",
        help="a config.json of Hugging Face, or its folder, as the preset; default: none",
    )
    group.add_argument(
        "--model-provider",
        type=flag_types.provider,
        metavar="MODULE:FUNCTION",
        help="build the Megatron-Core model with this function, not from model flags; default: none",
    )
    group.add_argument(
        plugins.FLAG,
        action="append",
        default=[],
        metavar="MODULE",
        help="register the transports, formats, encodings and engines of this module; may be repeated; default: none",
    )
    group.add_argument(
        "--refit-mode",
        choices=[mode.value for mode in Mode],
        default=Mode.NON_COLLOCATED.value,
        help="both models on the same ranks, or on disjoint ranks; default: non-collocated",
    )
    group.add_argument(
        "--source-weights",
        type=flag_types.absolute_path,
        metavar="DIR",
        help="fill the source from the safetensors of this folder, a checkpoint of Hugging Face, and measure it; its "
        "config.json describes the model where nothing else does; default: values by position",
    )
    group.add_argument(
        "--write-weights",
        type=flag_types.absolute_path,
        metavar="DIR",
        help="write what the destination holds after its refits as such a checkpoint, a new folder; default: none",
    )


def _add_ways_to_refit(group: argparse._ArgumentGroup) -> None:
    """What is sent, how, and by which engines."""
    needs = "; ".join(f"{name} needs {method.needs}" for name, method in METHODS.items())
    group.add_argument(
        "--refit-method",
        choices=[*METHODS, AUTO],
        help=f"what moves the bytes; required, except in a dry run. {needs}; {AUTO} takes the first of these that can "
        "run here",
    )
    titles = "; ".join(f"{name}: {ENCODINGS[name].title}" for name in chosen_encodings())
    group.add_argument(
        "--refit-encoding",
        choices=chosen_encodings(),
        default=IDENTITY,
        help=f"what is sent of the weights that the destination will hold. {titles}; default: {IDENTITY}",
    )
    group.add_argument(
        "--refit-relay",
        choices=[relay.value for relay in Relay],
        default=Relay.OFF.value,
        help="who passes on weights that several ranks need. node: each host gets them once, and its ranks exchange "
        "them; engine: they also leave the source once, and the hosts exchange them; auto: what has the least lower "
        "bound; default: off",
    )
    group.add_argument(
        "--refit-engine",
        type=flag_types.engines,
        metavar="NAME[,NAME]",
        help=f"engines to run, one after the other: {', '.join(ENGINES)}; both: refit,megatron; default: refit, "
        "and full where --refit-encoding sends changes",
    )


def add_run_flags(parser: FlagParser) -> None:
    _add_measurement_flags(parser)
    _add_transport_flags(parser)
    _add_output_flags(parser)
    _add_dry_run_flags(parser)


def _add_measurement_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--measure",
        type=flag_types.measurements,
        default=("refit",),
        metavar="NAME[,NAME]",
        help=f"what to measure: {', '.join(MEASUREMENTS)}, in this order whichever is named first; default: refit",
    )
    group.add_argument(
        "--verify",
        choices=[verify.value for verify in Verify],
        default=Verify.FULL.value,
        help="which destination elements are compared after each refit; default: full",
    )
    group.add_argument(
        "--num-benchmark-warmup",
        type=flag_types.non_negative,
        metavar="N",
        help="refits before the timed ones; default: 2, and more with --refit-encoding auto, which tries before it "
        "chooses",
    )
    group.add_argument(
        "--num-benchmark-iterations", type=flag_types.positive, default=5, metavar="N", help="timed refits; default: 5"
    )
    group.add_argument(
        "--repeat-until-stable",
        nargs="?",
        type=flag_types.up_to(limits.MAX_REPEATS),
        const=DEFAULT_REPEATS,
        metavar="N",
        help=f"go on until the {100 * CONFIDENCE:.0f} %% confidence interval of the median is within "
        f"{100 * STABLE_WIDTH:.0f} %% of it, for at most N timed refits; N without a number: {DEFAULT_REPEATS}; "
        "default: off",
    )
    group.add_argument("--check-forward", action="store_true", help="compare the logits of both models as well")
    group.add_argument("--profile-refit", action="store_true", help="record the GPU activity of one more refit")
    group.add_argument(
        "--timeout",
        type=flag_types.seconds,
        default=300.0,
        metavar="SECONDS",
        help="longest time of one phase of a run, in seconds; default: 300",
    )


def _add_transport_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("transport")
    group.add_argument(
        "--staging-mib",
        type=flag_types.up_to(limits.MAX_STAGING_MIB),
        default=512,
        metavar="MIB",
        help="staging memory per rank, in MiB; default: 512",
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where gloo and nixl find the models; gloo copies those on GPUs through pinned host memory; default: cpu",
    )
    group.add_argument(
        "--ranks-per-gpu",
        type=flag_types.positive,
        default=1,
        metavar="N",
        help="let up to N ranks share a GPU (cuda-ipc; gloo with --device cuda); default: 1",
    )
    for names, flag in method_flags().items():
        add_option_flag(group, names, flag, flag.help)


def _add_output_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--cluster",
        metavar="NAME",
        help="link speeds for the lower bound: a file of configs/clusters; default: chosen by the GPU's name",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("benchmark_results"),
        metavar="DIR",
        help="folder of the results; default: benchmark_results",
    )
    group.add_argument(
        "--run-name",
        type=flag_types.file_stem,
        metavar="NAME",
        help="the result is NAME.json; default: time and scenario",
    )


def _add_dry_run_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="plan and report, in one process and without a GPU")
    group.add_argument("--json", action="store_true", help="print what the dry run found as JSON, for programs")
    group.add_argument(
        "--num-gpus", type=flag_types.positive, metavar="N", help="GPUs available; default: as many as needed"
    )
    group.add_argument(
        "--gpus-per-node", type=flag_types.positive, default=8, metavar="N", help="GPUs per node; default: 8"
    )
