"""The command line's flags, under Megatron-LM's names wherever Megatron-LM has one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from refit.cli import flag_types, ignored_flags
from refit.config.scenario import Engine, Method, Mode, Verify
from refit.config.shape import Dtype
from refit.errors import UsageError

DEFAULT_VOCAB_SIZE = 32768
"""Where no vocabulary is given: a power of two, so that both sides hold the same rows at any TP size up to 256."""


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises UsageError in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(" ".join(message.removeprefix("argument ").split()))

    def parse_flags(self, argv: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Like `parse_args`; raises UsageError that names the nearest known flag for an unknown one."""
        parsed, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), None)
            if flag is None:
                raise UsageError(f"unexpected argument {unknown[0]!r}: every value follows a flag")
            raise self._unknown(flag.split("=")[0])
        return parsed

    def parse_mapping(self, values: Mapping[str, object]) -> argparse.Namespace:
        """Flags as a YAML file holds them, without dashes; `true` is a flag without a value, `false` none at all.

        Raises UsageError for what is no flag, or a value the flag cannot take.
        """
        return self.parse_flags(self.words(values))

    def words(self, values: Mapping[str, object]) -> list[str]:
        """The command line that says what such a mapping says. Raises UsageError for what is no flag, or has no
        value."""
        argv: list[str] = []
        for key, value in values.items():
            flag, takes_list = f"--{key}", self.takes_list(key)
            if value is None or isinstance(value, dict):
                raise UsageError(f"{key} needs a value")
            if isinstance(value, bool):
                argv += [flag] if value else []
            elif isinstance(value, list) and takes_list:
                argv += [flag, *map(str, value)]
            else:
                argv.append(f"{flag}={value}")
        return argv

    def takes_list(self, key: str) -> bool:
        """Whether the flag `--<key>` takes several values. Raises UsageError for what is no flag."""
        flag = f"--{key}"
        if flag not in self._option_string_actions:
            raise self._unknown(flag)
        return self._option_string_actions[flag].nargs == "*"

    def _unknown(self, flag: str) -> UsageError:
        return UsageError(f"unknown flag {flag}: {self._nearest(flag)}")

    def _nearest(self, flag: str) -> str:
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
        return f"did you mean {near[0]}?" if near else "no known flag is close to it, --help lists them"


def model_parser() -> FlagParser:
    """The flags that describe a model, as presets may hold them, and those that change no weight."""
    parser = FlagParser(add_help=False)
    _add_size_flags(parser)
    _add_style_flags(parser)
    _add_expert_flags(parser)
    _add_latent_attention_flags(parser)
    _add_inert_flags(parser)
    return parser


def full_parser() -> FlagParser:
    """Every flag of the command line."""
    parser = FlagParser(
        prog="benchmark_refit.py",
        usage="torchrun --nproc-per-node N benchmark_refit.py <flags>, or python benchmark_refit.py --dry-run <flags>",
        description="Build a model in two parallel layouts, move its weights from one to the other, verify and time "
        "it.",
        epilog="Megatron-LM's flags that change no weight (--seq-length, ...) are accepted and recorded.",
        parents=[model_parser()],
    )
    _add_layout_flags(parser)
    _add_refit_flags(parser)
    _add_dry_run_flags(parser)
    return parser


def recorded_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags given that change no weight, by name without dashes in front, with their values as given."""
    inert = {
        *ignored_flags.SIZES,
        *ignored_flags.VALUES,
        *ignored_flags.LISTS,
        *ignored_flags.SWITCHES,
        *ignored_flags.REFUSED_VALUES,
    }
    return {name: value for name, value in vars(args).items() if name in inert}


def _add_inert_flags(parser: FlagParser) -> None:
    for name in ignored_flags.SIZES:
        _add_hidden(parser, name, type=flag_types.positive)
    for name in ignored_flags.VALUES:
        _add_hidden(parser, name)
    for name in ignored_flags.LISTS:
        _add_hidden(parser, name, nargs="*")
    for name in ignored_flags.SWITCHES:
        _add_hidden(parser, name, action="store_true")
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
        ("num-layers", "transformer layers"),
        ("hidden-size", "width of the residual stream"),
        ("num-attention-heads", "attention heads"),
        ("num-query-groups", "groups of heads that share keys and values; default: one per head"),
        ("kv-channels", "width of a head; default: hidden size / heads"),
        ("ffn-hidden-size", "width of the dense MLP; default: 4 x hidden, with --swiglu 8/3 x hidden in steps of 64"),
        ("vocab-size", f"tokens, padded per TP size; default: {DEFAULT_VOCAB_SIZE}"),
        ("padded-vocab-size", "tokens, built as they are"),
        ("make-vocab-size-divisible-by", "the vocabulary is padded to a multiple of this x TP; default: 128"),
        ("max-position-embeddings", "positions of learned position embeddings; default: 4096"),
    ):
        group.add_argument(f"--{name}", type=flag_types.positive, metavar="N", help=text)
    group.add_argument("--group-query-attention", action="store_true", help="share keys and values between heads")


def _add_style_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("model style")
    # The tables of rotary variants (yarn, mrope) are not weights, but their builders ask for more settings.
    group.add_argument(
        "--position-embedding-type", choices=("learned_absolute", "rope", "none"), help="default: learned_absolute"
    )
    group.add_argument(
        "--use-rotary-position-embeddings",
        action="store_const",
        const="rope",
        dest="position_embedding_type",
        help="the same as --position-embedding-type rope",
    )
    group.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), help="default: LayerNorm")
    group.add_argument("--swiglu", action="store_true", help="gated MLPs with SiLU")
    group.add_argument("--disable-bias-linear", action="store_true", help="no biases in linear layers")
    group.add_argument("--add-qkv-bias", action="store_true", help="a bias in the QKV projection all the same")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true", help="an output layer of its own")
    group.add_argument("--qk-layernorm", action="store_true", help="norms on queries and keys")
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), help="layer spec; default: local")
    precision = parser.add_mutually_exclusive_group()
    for flag, dtype in (("--bf16", Dtype.BF16), ("--fp16", Dtype.FP16), ("--fp32", Dtype.FP32)):
        precision.add_argument(
            flag, action="store_const", const=dtype, dest="dtype", help=f"{dtype.value} parameters; default: bfloat16"
        )


def _add_expert_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("mixture of experts")
    for name, text in (
        ("num-experts", "routed experts per MoE layer"),
        ("moe-router-topk", "experts per token; default: 2"),
        ("moe-ffn-hidden-size", "width of a routed expert; default: --ffn-hidden-size"),
        ("moe-shared-expert-intermediate-size", "width of the shared experts together; default: none"),
    ):
        group.add_argument(f"--{name}", type=flag_types.positive, metavar="N", help=text)
    group.add_argument(
        "--moe-layer-freq",
        type=flag_types.layer_frequency,
        metavar="FREQ",
        help="N or a list like ([0]*1+[1]*60); default: 1",
    )
    group.add_argument("--moe-router-enable-expert-bias", action="store_true", help="the router's float32 expert bias")
    group.add_argument("--moe-grouped-gemm", action="store_true", help="grouped experts in place of a sequence of MLPs")


def _add_latent_attention_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("multi-latent attention")
    group.add_argument("--multi-latent-attention", action="store_true", help="attention of DeepSeek-V2 and later")
    for name, text in (
        ("q-lora-rank", "rank of the queries; default: one full projection"),
        ("kv-lora-rank", "rank of keys and values; default: 32"),
        ("qk-head-dim", "width of a query or key head; default: 128"),
        ("qk-pos-emb-head-dim", "width of its rotary part; default: 64"),
        ("v-head-dim", "width of a value head; default: 128"),
    ):
        group.add_argument(f"--{name}", type=flag_types.positive, metavar="N", help=text)


def _add_layout_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("layouts")
    for name, text in (
        ("tensor-model-parallel-size", "source TP; default: 1"),
        ("pipeline-model-parallel-size", "source PP; default: 1"),
        ("expert-model-parallel-size", "source EP; default: 1"),
        ("expert-tensor-parallel-size", "source ETP; default: its TP"),
        ("decoder-first-pipeline-num-layers", "layers on the source's first stage, where uneven"),
        ("decoder-last-pipeline-num-layers", "layers on the source's last stage, where uneven"),
        ("source-world-size", "ranks of the source; default: TP x EP x PP"),
        ("rl-inference-tensor-model-parallel-size", "destination TP; default: the source's"),
        ("rl-inference-pipeline-model-parallel-size", "destination PP; default: the source's"),
        ("rl-inference-expert-model-parallel-size", "destination EP; default: the source's"),
        ("rl-inference-expert-tensor-model-parallel-size", "destination ETP; default: its TP"),
        ("rl-inference-decoder-first-pipeline-num-layers", "layers on the destination's first stage, where uneven"),
        ("rl-inference-decoder-last-pipeline-num-layers", "layers on the destination's last stage, where uneven"),
        ("destination-world-size", "ranks of the destination; default: TP x EP x PP"),
    ):
        group.add_argument(f"--{name}", type=flag_types.positive, metavar="N", help=text)


def _add_refit_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("refit")
    group.add_argument("--model", metavar="NAME", help="a preset of configs/models, or a YAML file; flags override it")
    group.add_argument(
        "--model-provider",
        type=flag_types.provider,
        metavar="MODULE:FUNCTION",
        help="build this Megatron-Core model, in place of the one that model flags describe",
    )
    for name, kind, default, text in (
        ("refit-mode", Mode, Mode.NON_COLLOCATED, "both models on the same ranks, or on disjoint ones"),
        ("refit-method", Method, None, "what moves the bytes; required but in a dry run"),
        ("refit-engine", Engine, Engine.REFIT, "this refit, Megatron-Core's own, or one after the other"),
        ("verify", Verify, Verify.FULL, "destination elements compared after each refit"),
    ):
        choices: list[str] = [member.value for member in kind]
        shown = f"{text}; default: {default.value}" if default else text
        group.add_argument(f"--{name}", choices=choices, default=default.value if default else None, help=shown)
    group.add_argument(
        "--num-benchmark-warmup", type=flag_types.non_negative, default=2, metavar="N", help="default: 2"
    )
    group.add_argument(
        "--num-benchmark-iterations", type=flag_types.positive, default=5, metavar="N", help="default: 5"
    )
    group.add_argument("--check-forward", action="store_true", help="compare the logits of both models as well")
    group.add_argument("--profile-refit", action="store_true", help="record what each GPU does in one more refit")
    group.add_argument(
        "--staging-mib", type=flag_types.positive, default=512, metavar="N", help="staging per rank; default: 512"
    )
    group.add_argument(
        "--timeout", type=flag_types.seconds, default=300.0, metavar="S", help="longest wait; default: 300 s"
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where gloo finds the models, cuda: over pinned host memory; default: cpu",
    )
    group.add_argument(
        "--nvshmem-buffers", choices=("ring", "direct"), default="ring", help="through a bounded ring, or in place"
    )
    group.add_argument(
        "--nvshmem-force-put", action="store_true", help="reach peers on this node as those on others are"
    )
    group.add_argument(
        "--cluster",
        metavar="NAME",
        help="speeds for the lower bound, from configs/clusters; default: by the GPU's name",
    )
    group.add_argument("--output-dir", type=Path, default=Path("benchmark_results"), help="default: benchmark_results")
    group.add_argument(
        "--run-name",
        type=flag_types.file_stem,
        metavar="NAME",
        help="the result is NAME.json; default: named after time and scenario",
    )


def _add_dry_run_flags(parser: FlagParser) -> None:
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="plan and report, on one process and without a GPU")
    group.add_argument(
        "--num-gpus", type=flag_types.positive, metavar="N", help="GPUs there are; default: as many as needed"
    )
    group.add_argument("--gpus-per-node", type=flag_types.positive, default=8, metavar="N", help="default: 8")
