"""The flags of training steps and forward passes, under Megatron-LM's names where it has one.

Where no step is measured they are accepted and recorded, since a refit does not depend on them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from refit.cli import flag_types
from refit.cli.flag_parser import FlagParser
from refit.config import limits
from refit.config.registry import FORMATS, MEASUREMENTS, load
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.config.steps import Dispatch, Recompute, StepSettings
from refit.errors import UsageError

COUNT = flag_types.up_to(limits.MAX_COUNT)
SWITCH: dict[str, Any] = {"action": "store_true"}

STEP_FLAGS: dict[str, dict[str, Any]] = {
    "micro-batch-size": {"type": COUNT, "metavar": "N", "help": "sequences of a micro-batch; default: 1"},
    "global-batch-size": {
        "type": COUNT,
        "metavar": "N",
        "help": "sequences of a step; default: a micro-batch on each replica and pipeline stage",
    },
    "seq-length": {
        "type": flag_types.up_to(limits.MAX_SIZE),
        "metavar": "N",
        "help": "tokens of a sequence; default: 4096, or all positions of the model where they are fewer",
    },
    "num-train-steps": {"type": COUNT, "metavar": "N", "help": "timed steps or passes; default: 5"},
    "num-train-warmup": {
        "type": flag_types.non_negative,
        "metavar": "N",
        "help": "steps or passes before the timed ones; default: 2",
    },
    "lr": {"type": flag_types.rate, "metavar": "X", "help": "learning rate of AdamW; default: 1e-4"},
    "weight-decay": {"type": flag_types.rate, "metavar": "X", "help": "weight decay of AdamW; default: 0.01"},
    "clip-grad": {"type": flag_types.rate, "metavar": "X", "help": "largest norm of the gradients; default: 1.0"},
    "initial-loss-scale": {
        "type": flag_types.loss_scale,
        "metavar": "X",
        "help": "what fp16 multiplies the loss by at first; default: 65536",
    },
    "seed": {"type": flag_types.non_negative, "metavar": "N", "help": "seed of the mock tokens; default: 1234"},
    "sequence-parallel": {**SWITCH, "help": "split norms and residuals of the source along the sequence, over TP"},
    "recompute-activations": {**SWITCH, "help": "the same as --recompute-granularity selective"},
    "recompute-granularity": {
        "choices": ("selective", "full"),
        "help": "which activations to compute again; default: none",
    },
    "recompute-method": {
        "choices": ("uniform", "block"),
        "help": "how full recomputation divides the layers; default: none",
    },
    "recompute-num-layers": {
        "type": flag_types.up_to(limits.MAX_LAYERS),
        "metavar": "N",
        "help": "layers of a unit of full recomputation; default: none",
    },
    "recompute-modules": {
        "nargs": "*",
        "metavar": "NAME",
        "help": "modules of selective recomputation; default: core_attn",
    },
    "moe-token-dispatcher-type": {
        "choices": ("allgather", "alltoall", "flex"),
        "help": "how tokens reach their experts; default: allgather",
    },
    "moe-flex-dispatcher-backend": {
        "choices": ("deepep", "hybridep", "ncclep"),
        "help": "what the flex dispatcher sends with; default: deepep",
    },
    "moe-expert-rank-capacity-factor": {
        "type": flag_types.factor,
        "metavar": "FACTOR",
        "help": "tokens that ncclep has room for on a rank, over those of balanced experts: a step with more fails; "
        "default: none, ncclep needs one",
    },
    "overlap-moe-expert-parallel-comm": {
        **SWITCH,
        "help": "exchange tokens behind the computation of another micro-batch",
    },
    "delay-wgrad-compute": {**SWITCH, "help": "compute weight gradients apart, to overlap more"},
    "moe-router-force-load-balancing": {
        **SWITCH,
        "help": "draw experts at random, so that all get equally many tokens",
    },
    "moe-router-dtype": {"choices": ("fp32", "fp64"), "help": "dtype of the router; default: that of the parameters"},
}

NEUTRAL = re.compile(
    r"-(?:log|logging|logger|wandb|tensorboard|save|load|ckpt|checkpoint|data|dataset|dataloader|mock|tokenizer|vocab|"
    r"merge|eval|exit|timeout|split|train|valid|validation|test|finetune|profile|profiler|timing|rerun|straggler|"
    r"workers|cache|mmap|rl|grpo|langrl|inference|local|verify|warmup|recorder|rank|distributed-backend|samples|app|"
    r"onelogger|interval|iterations|sft|gc|nvtx|record|hysteresis|iters|fraction|style)(?=-)"
)
"""Words that mark a flag as one that no step depends on: logs, checkpoints, data (tokens are mock ones), schedules."""

BUILT = {
    "optimizer": "adam",
    "moe-router-load-balancing-type": "none",
    "moe-aux-loss-coeff": "0",
    "attention-dropout": "0",
    "hidden-dropout": "0",
    "use-distributed-optimizer": "",
    "use-mcore-models": "",
    "no-load-optim": "",
    "no-gradient-accumulation-fusion": "",
    "no-masked-softmax-fusion": "",
    "no-bias-gelu-fusion": "",
    "no-bias-swiglu-fusion": "",
    "no-bias-dropout-fusion": "",
    "no-rope-fusion": "",
}
"""Flags that state what a step here does: the value they must have, "" for a switch."""


def add_step_flags(parser: FlagParser) -> None:
    """Add the flags. They appear in the namespace, under their own names, only where given."""
    group = parser.add_argument_group("training step and forward (recorded only where neither is measured)")
    for name, options in STEP_FLAGS.items():
        group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, **options)


def runs_steps(measurements: Sequence[str]) -> bool:
    """Whether one of these measurements runs steps."""
    return any(MEASUREMENTS[name].runs_steps for name in measurements)


def step_settings(
    args: argparse.Namespace, sides: tuple[SideSpec, SideSpec], model: ModelShape | None, recorded: dict[str, object]
) -> StepSettings | None:
    """The settings of the steps, None where none is measured. `recorded` are the flags that were only recorded.

    Raises UsageError for settings that cannot run, by the rules of the sides' formats, and for recorded flags that
    would change a step.
    """
    if not runs_steps(args.measure):
        return None
    measured = " and ".join(name for name in args.measure if MEASUREMENTS[name].runs_steps)
    if model is None:
        raise UsageError(
            f"--measure {measured} needs a model of known shape, --model-provider has none: describe it by flags"
        )
    _check_recorded(recorded, model, measured)
    steps = _settings(args, sides[0], model)
    if steps.dispatch.backend == "ncclep" and tuple(args.measure) != ("train-step",):
        raise UsageError(
            "--moe-flex-dispatcher-backend ncclep is set up once per process, for one model and one size of "
            f"micro-batch (Transformer Engine's ep_bootstrap), and --measure {','.join(args.measure)} has more: use "
            "--measure train-step"
        )
    for side, name, trains in ((sides[0], "source", "train-step" in args.measure), (sides[1], "destination", False)):
        if trains or (name == "destination" and "forward" in args.measure):
            support = FORMATS[side.format].steps
            if support is None:
                raise UsageError(
                    f"--measure {measured}: {side.format} sides run no steps here: measure the refit alone"
                )
            load(support.check)(model, side, steps if trains else steps.forward_only, trains, name)
    return steps


def _settings(args: argparse.Namespace, source: SideSpec, model: ModelShape) -> StepSettings:
    given = {name: value for name, value in vars(args).items() if name in STEP_FLAGS}
    micro = given.get("micro-batch-size", 1)
    granularity = given.get("recompute-granularity") or ("selective" if "recompute-activations" in given else None)
    modules = given.get("recompute-modules") or (["core_attn"] if granularity == "selective" else [])
    dispatcher = given.get("moe-token-dispatcher-type", "allgather")
    backend = given.get("moe-flex-dispatcher-backend")
    if backend is not None and dispatcher != "flex":
        raise UsageError(
            f"--moe-flex-dispatcher-backend {backend} is for --moe-token-dispatcher-type flex, not {dispatcher}: "
            "leave it out"
        )
    optional = {"num-train-steps": "num_steps", "num-train-warmup": "num_warmup", "lr": "lr", "seed": "seed"}
    optional |= {"weight-decay": "weight_decay", "clip-grad": "clip_grad", "initial-loss-scale": "initial_loss_scale"}
    return StepSettings(
        micro_batch_size=micro,
        global_batch_size=given.get("global-batch-size", micro * source.layout.dp * source.layout.pp),
        seq_length=given.get("seq-length", min(4096, model.max_position_embeddings)),
        # As Megatron-LM's arguments.py: without tensor parallelism there is nothing to split over.
        sequence_parallel="sequence-parallel" in given and source.layout.tp > 1,
        recompute=Recompute(
            granularity, given.get("recompute-method"), given.get("recompute-num-layers"), tuple(modules)
        ),
        dispatch=Dispatch(
            dispatcher,
            (backend or "deepep") if dispatcher == "flex" else None,
            rank_capacity=given.get("moe-expert-rank-capacity-factor"),
            overlap="overlap-moe-expert-parallel-comm" in given,
            delay_wgrad="delay-wgrad-compute" in given,
            balanced="moe-router-force-load-balancing" in given,
            router_dtype=given.get("moe-router-dtype"),
        ),
        **{field: given[name] for name, field in optional.items() if name in given},
    )


def _check_recorded(recorded: dict[str, object], model: ModelShape, measured: str) -> None:
    """Raise UsageError for a flag that a refit only records, and that would change a step without being honoured."""
    biased = model.experts is not None and model.experts.expert_bias
    built = {**BUILT, "moe-router-score-function": "sigmoid" if biased else "softmax"}
    for name, value in recorded.items():
        if name in built:
            expected = built[name]
            if expected and not _equal(value, expected):
                raise UsageError(
                    f"--{name} {_text(value)} is not built into the steps of --measure {measured}, which run with "
                    f"{expected}: leave it out"
                )
        elif not NEUTRAL.search(f"-{name}-"):
            raise UsageError(f"--{name} may change a step, and --measure {measured} does not honour it: leave it out")


def _equal(value: object, expected: str) -> bool:
    try:
        return float(_text(value)) == float(expected)
    except ValueError:
        return _text(value) == expected


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
