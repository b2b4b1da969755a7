"""The command line's flags, under Megatron-LM's names wherever Megatron-LM has one."""

from __future__ import annotations

import argparse
import difflib
import functools
from pathlib import Path
from typing import Any

import refit
from refit.cli import flag_types, ignored_flags
from refit.cli.flag_parser import FlagParser
from refit.cli.listing import add_list
from refit.cli.step_flags import STEP_FLAGS, add_step_flags, runs_steps
from refit.config import limits
from refit.config.flag_names import (
    FORMAT_FLAGS,
    LAYERS_PER_CHUNK_FLAGS,
    OPTION_FLAGS,
    PIPELINE_LAYOUT_FLAGS,
    SIZE_FLAGS,
)
from refit.config.placement import read_placement
from refit.config.quantisation import BLOCK_FORMATS, KEPT, Place
from refit.config.registry import AUTO, ENGINES, FORMATS, MEASUREMENTS, METHODS
from refit.config.scenario import Mode, Verify
from refit.config.shape import Dtype
from refit.config.side import MAX_ZERO_STAGE
from refit.results.stats import CONFIDENCE, STABLE_WIDTH

DEFAULT_REPEATS = 200
"""Most timed refits of `--repeat-until-stable` without a number."""

DEFAULT_VOCAB_SIZE = 32768
"""Where no vocabulary is given: a power of two, so that both sides hold the same rows at any TP size up to 256."""

EXAMPLES = """\
Flags without a value are off unless given. Megatron-LM's flags that change no weight (--seq-length, --wandb-project, \
...) are accepted and recorded.

examples:
  refit run --list
  refit run --model tiny --refit-method gloo --rl-inference-tensor-model-parallel-size 2
  refit run --model qwen3_30b_a3b --refit-method nccl --expert-model-parallel-size 4 --repeat-until-stable
  benchmark_refit.py --dry-run --model kimi_k2 --expert-model-parallel-size 64"""

TYPO_CUTOFF = 0.9
"""Similarity (difflib's ratio) from which a flag of a family is taken for a misspelt flag that the parser has."""


class BenchmarkParser(FlagParser):
    """The parser of benchmark_refit.py, which also knows the families of Megatron-LM's flags."""

    def _has(self, flag: str) -> bool:
        """Whether there is such a flag. A flag of a family is added here, when it is first seen."""
        if super()._has(flag):
            return True
        name = flag.removeprefix("--")
        if name == flag or not ignored_flags.in_family(name) or _resembles_known_flag(flag):
            return False
        _add_hidden(self, name, nargs="?", const=True)
        return True


def model_parser() -> BenchmarkParser:
    """The flags that describe a model, as presets may hold them, and Megatron-LM's that change no weight."""
    parser = BenchmarkParser(add_help=False)
    _add_model_flags(parser)
    return parser


def full_parser() -> BenchmarkParser:
    """Every flag of the command line. Those of a refit come first in its help, those of a model last."""
    parser = BenchmarkParser(
        prog="benchmark_refit.py",
        usage="refit run FLAGS, torchrun --nproc-per-node N benchmark_refit.py FLAGS, "
        "or benchmark_refit.py --dry-run FLAGS",
        description="Build a model in two parallel layouts, transfer its weights from one to the other, verify and "
        "time the transfer.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"refit-benchmark {refit.__version__}")
    add_list(parser)
    _add_refit_flags(parser)
    _add_layout_flags(parser)
    _add_quantisation_flags(parser)
    _add_measurement_flags(parser)
    _add_transport_flags(parser)
    _add_output_flags(parser)
    _add_dry_run_flags(parser)
    _add_model_flags(parser)
    return parser


def _add_model_flags(parser: FlagParser) -> None:
    _add_size_flags(parser)
    _add_style_flags(parser)
    _add_expert_flags(parser)
    _add_latent_attention_flags(parser)
    add_step_flags(parser)
    _add_ignored_flags(parser)


@functools.cache
def _resembles_known_flag(flag: str) -> bool:
    """Whether `flag` is, or almost is, a flag of the full command line that is not one of a family."""
    return bool(difflib.get_close_matches(flag, full_parser()._option_string_actions, n=1, cutoff=TYPO_CUTOFF))


def recorded_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags given that change no weight, by name without dashes in front, with their values as given.

    Those of a step are among them where no step is measured.
    """
    named = {*ignored_flags.NAMED, *ignored_flags.REFUSED_VALUES, *STEP_FLAGS}
    if runs_steps(getattr(args, "measure", ())):
        named -= STEP_FLAGS.keys()
    return {
        name: value
        for name, value in vars(args).items()
        if name in named or (name not in STEP_FLAGS and ignored_flags.in_family(name))
    }


def _add_ignored_flags(parser: FlagParser) -> None:
    takes: dict[str, dict[str, Any]] = {
        "#": {"type": flag_types.up_to(limits.MAX_RECORDED)},
        "=": {},
        "*": {"nargs": "*"},
        "": {"action": "store_true"},
    }
    for name, sign in ignored_flags.NAMED.items():
        _add_hidden(parser, name, **takes[sign])
    for name, (neutral, reason) in ignored_flags.REFUSED_VALUES.items():
        _add_hidden(parser, name, type=flag_types.refusal(neutral, reason))
    for name, reason in ignored_flags.REFUSED_SWITCHES.items():
        _add_hidden(parser, name, action=flag_types.RefusedSwitch, nargs=0, const=reason)


def _add_hidden(parser: FlagParser, name: str, **options: Any) -> None:
    """A flag that `--help` leaves out and that appears in the namespace, under its own name, only where given."""
    parser.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def _add_size_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("model sizes")
    for name, text in (
        ("num-layers", "transformer layers; required without a preset"),
        ("hidden-size", "width of the residual stream; required without a preset"),
        ("num-attention-heads", "attention heads; required without a preset"),
        (
            "num-query-groups",
            "groups of heads that share keys and values; default: one per head, 1 with --group-query-attention",
        ),
        ("kv-channels", "width of a head; default: hidden size / heads"),
        ("ffn-hidden-size", "width of the dense MLP; default: 4 x hidden, with --swiglu 8/3 x hidden in steps of 64"),
        ("vocab-size", f"tokens before padding; default: {DEFAULT_VOCAB_SIZE}"),
        ("padded-vocab-size", "tokens after padding; default: --vocab-size, padded"),
        ("make-vocab-size-divisible-by", "pad the vocabulary to a multiple of N x TP; default: 128"),
        ("max-position-embeddings", "positions of learned position embeddings; default: 4096"),
    ):
        most = limits.MAX_LAYERS if name == "num-layers" else limits.MAX_SIZE
        group.add_argument(f"--{name}", type=flag_types.up_to(most), metavar="N", help=text)
    group.add_argument(
        "--mtp-num-layers",
        type=flag_types.up_to(limits.MAX_LAYERS, least=0),
        metavar="N",
        help="multi-token prediction layers behind the last layer, as in DeepSeek-V3; default: 0",
    )
    group.add_argument("--group-query-attention", action="store_true", help="share keys and values between heads")


def _add_style_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("model style")
    # Rotary variants (yarn, mrope) have no weights either, but need settings that this parser only records.
    group.add_argument(
        "--position-embedding-type",
        choices=("learned_absolute", "rope", "none"),
        help="position embeddings; default: learned_absolute",
    )
    group.add_argument(
        "--use-rotary-position-embeddings",
        action="store_const",
        const="rope",
        dest="position_embedding_type",
        help="the same as --position-embedding-type rope",
    )
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), help="norm layers; default: LayerNorm")
    group.add_argument("--swiglu", action="store_true", help="gated MLPs with SiLU")
    group.add_argument("--disable-bias-linear", action="store_true", help="no biases in linear layers")
    group.add_argument(
        "--add-qkv-bias", action="store_true", help="a bias in the QKV projection, even with --disable-bias-linear"
    )
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="a separate output layer")
    group.add_argument("--qk-layernorm", action="store_true", help="norms on queries and keys")
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), help="layer spec; default: local")
    precision = parser.add_mutually_exclusive_group()
    for flag, dtype in (("--bf16", Dtype.BF16), ("--fp16", Dtype.FP16), ("--fp32", Dtype.FP32)):
        precision.add_argument(
            flag, action="store_const", const=dtype, dest="dtype", help=f"{dtype.value} parameters; default: --bf16"
        )


def _add_expert_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("mixture of experts")
    for name, text in (
        ("num-experts", "routed experts per MoE layer; default: none, only dense MLPs"),
        ("moe-router-topk", "experts per token; default: 2, or all where there are fewer"),
        ("moe-ffn-hidden-size", "width of a routed expert; default: --ffn-hidden-size"),
        ("moe-shared-expert-intermediate-size", "width of the shared experts together; default: none"),
        ("moe-latent-size", "width that routed experts work in, between projections; default: --hidden-size"),
    ):
        most = limits.MAX_EXPERTS if name in ("num-experts", "moe-router-topk") else limits.MAX_SIZE
        group.add_argument(f"--{name}", type=flag_types.up_to(most), metavar="N", help=text)
    group.add_argument(
        "--moe-layer-freq",
        type=flag_types.layer_frequency,
        metavar="FREQ",
        help="which layers have experts: every N-th, or a list like ([0]*1+[1]*60); default: 1",
    )
    group.add_argument(
        "--moe-router-enable-expert-bias", action="store_true", help="an expert bias in the router, in float32"
    )
    group.add_argument("--moe-grouped-gemm", action="store_true", help="experts as a grouped GEMM, not one MLP each")


def _add_latent_attention_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("multi-latent attention")
    group.add_argument(
        "--multi-latent-attention", action="store_true", help="multi-latent attention, as in DeepSeek-V2"
    )
    for name, text in (
        ("q-lora-rank", "rank of the queries; default: one full projection"),
        ("kv-lora-rank", "rank of keys and values; default: 32"),
        ("qk-head-dim", "width of a query or key head; default: 128"),
        ("qk-pos-emb-head-dim", "width of the rotary part of a query or key head; default: 64"),
        ("v-head-dim", "width of a value head; default: 128"),
    ):
        group.add_argument(f"--{name}", type=flag_types.up_to(limits.MAX_SIZE), metavar="N", help=text)


def _add_layout_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("layouts")
    texts = {
        "tp": ("TP", "1", "the source's"),
        "pp": ("PP", "1", "the source's"),
        "ep": ("EP", "1", "the source's"),
        "etp": ("ETP", "its TP", "its TP"),
        "vpp": ("model chunks on each rank, in interleaved pipeline stages", "1", "1"),
        "first_stage_layers": ("layers on the first stage", "an even split", "an even split"),
        "last_stage_layers": ("layers on the last stage", "an even split", "an even split"),
        "world_size": ("ranks", "TP x EP x PP", "TP x EP x PP"),
    }
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


_OPTION_FLAGS: dict[str, dict[str, Any]] = {
    "replicate_size": {"metavar": "N", "help": "replicas of the sharded model (HSDP); default: 1"},
    "zero_stage": {
        "type": flag_types.up_to(MAX_ZERO_STAGE, least=0),
        "metavar": "N",
        "help": "ZeRO stage, 0 to 2; default: 1",
    },
    "data_parallel_size": {"metavar": "N", "help": "ranks of an engine with the same dense weights; default: 1"},
    "replicas": {"metavar": "N", "help": "equal engines, each on ranks of its own; default: 1"},
    "num_redundant_experts": {
        "type": flag_types.up_to(limits.MAX_EXPERTS),
        "metavar": "N",
        "help": "second copies of experts in each layer of an engine; default: none",
    },
    "placement": {
        "type": read_placement,
        "metavar": "PLACEMENT",
        "help": "experts on ranks: linear, round_robin or a JSON file with a physical_to_logical_map; default: linear",
    },
    "placement_next": {
        "type": read_placement,
        "metavar": "PLACEMENT",
        "help": "the placement that an engine changes to between two refits; default: none",
    },
}
"""Field of a format's options -> how its flags are added. A number is at most MAX_RANKS unless a type is given."""


def _add_format_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("formats")
    for place, side in enumerate(("source", "destination")):
        group.add_argument(
            f"--{FORMAT_FLAGS[place]}",
            choices=[name for name, row in FORMATS.items() if place or not row.destination_only],
            default="megatron",
            help=f"{side}: the library that holds the weights; default: megatron",
        )
        for name, options in OPTION_FLAGS.items():
            for field, flags in options.items():
                added: dict[str, Any] = {"type": flag_types.up_to(limits.MAX_RANKS), **_OPTION_FLAGS[field]}
                added["help"] = f"{side}, {name} only: {added['help']}"
                if flags[place] is not None:
                    group.add_argument(f"--{flags[place]}", **added)


def _add_quantisation_flags(parser: FlagParser) -> None:
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


def _add_refit_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("refit")
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
        "--refit-mode",
        choices=[mode.value for mode in Mode],
        default=Mode.NON_COLLOCATED.value,
        help="both models on the same ranks, or on disjoint ranks; default: non-collocated",
    )
    needs = "; ".join(f"{name} needs {method.needs}" for name, method in METHODS.items())
    group.add_argument(
        "--refit-method",
        choices=[*METHODS, AUTO],
        help=f"what moves the bytes; required, except in a dry run. {needs}; {AUTO} takes the first of these that can "
        "run here",
    )
    group.add_argument(
        "--refit-engine",
        type=flag_types.engines,
        default=("refit",),
        metavar="NAME[,NAME]",
        help=f"engines to run, one after the other: {', '.join(ENGINES)}; both: refit,megatron; default: refit",
    )


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
        default=2,
        metavar="N",
        help="refits before the timed ones; default: 2",
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
        help="where gloo finds the models; cuda copies through pinned host memory; default: cpu",
    )
    group.add_argument(
        "--one-sided-buffers",
        "--nvshmem-buffers",
        choices=("ring", "direct"),
        default="ring",
        help="what nvshmem and shm write into: a ring of bounded size, or the weights themselves; default: ring",
    )
    group.add_argument(
        "--nvshmem-force-put", action="store_true", help="reach ranks on the same node as ranks on other nodes"
    )


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
