"""Megatron's rules for training steps and forward passes, checked before any model is built.

The rules are those of Megatron-Core 0.16.1 and 0.19.2: `TransformerConfig.__post_init__`, the schedules
(pipeline_parallel/schedules.py), the MoE layers, and Megatron-LM's arguments.py. Each message names its rule.
"""

from __future__ import annotations

from collections.abc import Iterator

from refit.config.layout import Layout
from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.errors import UsageError

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
"""`recompute_modules` that both versions know."""


def check_steps(model: ModelShape, side: SideSpec, steps: StepSettings, trains: bool, name: str) -> None:
    """Raise UsageError for steps that Megatron refuses for this model and side. Messages call the side `name`."""
    rules = _training_rules(model, side, steps) if trains else _forward_rules(model, side, steps)
    problem = next(rules, None)
    if problem is not None:
        raise UsageError(f"{name}: {problem}")


def _forward_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    if steps.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {steps.seq_length} is more than the {model.max_position_embeddings} positions of the model "
            "(Megatron-LM: seq_length <= max_position_embeddings): lower it, or raise --max-position-embeddings"
        )
    yield from _dispatch_rules(model, side, steps)


def _training_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    yield from _forward_rules(model, side, steps)
    yield from _batch_rules(side.layout, steps)
    yield from _sequence_rules(model, side.layout, steps)
    yield from _recompute_rules(model, side, steps)
    yield from _overlap_rules(model, side, steps)
    if model.mtp_num_layers and side.layout.vpp > 1:
        # 0.19.2 asks for a layout of its own (--pipeline-model-parallel-layout) here.
        yield "multi-token prediction layers are not trained with virtual pipeline stages here: --mtp-num-layers 0"


def _batch_rules(layout: Layout, steps: StepSettings) -> Iterator[str]:
    size, parts = steps.global_batch_size, steps.micro_batch_size * layout.dp
    if size % parts:
        yield (
            f"--global-batch-size {size} is not divisible by micro-batch {steps.micro_batch_size} x DP {layout.dp} = "
            f"{parts} (Megatron-Core's num_microbatches_calculator): give a multiple of {parts}"
        )
        return
    number = steps.num_microbatches(layout.dp)
    if layout.vpp > 1 and number % layout.pp:
        yield (
            f"{number} micro-batches are not divisible by PP {layout.pp} (Megatron-Core's interleaved schedule): give "
            f"a --global-batch-size that is a multiple of {parts * layout.pp}"
        )


def _sequence_rules(model: ModelShape, layout: Layout, steps: StepSettings) -> Iterator[str]:
    if model.experts is not None and layout.tp > 1 and not steps.sequence_parallel:
        yield (
            f"experts train with TP {layout.tp} under sequence parallelism only (Megatron-Core's MoELayer): give "
            "--sequence-parallel"
        )
    if model.experts is not None and layout.ep == 1 and layout.etp != layout.tp:
        yield (
            f"with EP 1 experts train with ETP = TP, here {layout.etp} and {layout.tp}: Megatron-Core sums their "
            "gradients over the replicas of dense layers (0.16.1): raise EP, or leave ETP out"
        )
    if steps.sequence_parallel and steps.seq_length % layout.tp:
        yield (
            f"--seq-length {steps.seq_length} is not divisible by TP {layout.tp}, as sequence parallelism needs "
            f"(Megatron-Core): give a multiple of {layout.tp}"
        )


def _dispatch_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    dispatch, layout = steps.dispatch, side.layout
    if model.experts is None:
        if dispatch.dispatcher != "allgather" or dispatch.overlap or dispatch.balanced:
            yield "a model without experts dispatches no tokens: leave the --moe-... flags out, or give --num-experts"
        return
    capacity = "--moe-expert-rank-capacity-factor"
    if dispatch.backend == "ncclep" and dispatch.rank_capacity is None:
        yield (
            f"NCCL EP needs {capacity}, its room for tokens on a rank (Megatron-Core's _NCCLEPManager): give 1.5, or "
            "more where routing is not forced balanced"
        )
    if dispatch.backend != "ncclep" and dispatch.rank_capacity is not None:
        yield f"{capacity} is honoured for --moe-flex-dispatcher-backend ncclep only, others would drop tokens"
    if dispatch.dispatcher != "flex":
        return
    if layout.etp * layout.ep == 1:
        yield "the flex dispatcher requires TPxEP > 1 (Megatron-Core's MoEFlexTokenDispatcher): raise EP"
    if dispatch.backend == "deepep" and dispatch.router_dtype != "fp32":
        yield (
            "DeepEP takes float32 probabilities only (Megatron-Core's _DeepepManager): give --moe-router-dtype fp32, "
            "to every arm that is compared"
        )


def _recompute_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    recompute, rule = steps.recompute, "(Megatron-Core's TransformerConfig)"
    if recompute.granularity == "full":
        if recompute.method is None or recompute.num_layers is None:
            yield (
                f"--recompute-granularity full needs --recompute-method and --recompute-num-layers {rule}: give "
                "--recompute-method uniform --recompute-num-layers 1"
            )
    elif recompute.method is not None or recompute.num_layers is not None:
        yield (
            f"--recompute-method and --recompute-num-layers are for --recompute-granularity full {rule}: leave them out"
        )
    if recompute.modules and recompute.granularity != "selective":
        yield f"--recompute-modules is for --recompute-granularity selective {rule}: leave it out"
    unknown = sorted(set(recompute.modules) - set(MODULES))
    if unknown:
        yield f"--recompute-modules {unknown[0]} is not one of {', '.join(MODULES)} {rule}"
    if "mla_up_proj" in recompute.modules and model.mla is None:
        yield f"--recompute-modules mla_up_proj needs multi-latent attention {rule}"
    if "moe_act" in recompute.modules:
        if model.experts is None or not model.experts.grouped_gemm:
            yield f"--recompute-modules moe_act needs --moe-grouped-gemm {rule}"
        if side.transformer_impl == "local":
            yield "--recompute-modules moe_act is honoured by the experts of Transformer Engine only: leave it out"


def _overlap_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    dispatch, recompute, layout = steps.dispatch, steps.recompute, side.layout
    flag, rule = "--overlap-moe-expert-parallel-comm", "(Megatron-Core's TransformerConfig)"
    if dispatch.delay_wgrad and not dispatch.overlap:
        yield f"--delay-wgrad-compute needs {flag} {rule}"
    if not dispatch.overlap:
        return
    if layout.pp > 1 and layout.vpp == 1:
        yield f"{flag} with PP {layout.pp} needs virtual pipeline stages {rule}: --num-virtual-stages-per-pipeline-rank"
    if layout.ep == 1:
        yield f"{flag} needs expert parallelism {rule}: raise --expert-model-parallel-size"
    if dispatch.dispatcher == "allgather":
        yield f"{flag} needs the dispatcher alltoall or flex {rule}: --moe-token-dispatcher-type alltoall"
    if recompute.granularity == "full" or "moe" in recompute.modules:
        yield f"{flag} allows neither full recomputation nor that of `moe` {rule}: leave it out"
    if side.dtype not in (Dtype.BF16, Dtype.FP16):
        yield f"{flag} needs bf16 or fp16 {rule}"
    if model.mtp_num_layers > 1:
        yield f"{flag} allows 1 multi-token prediction layer, the model has {model.mtp_num_layers} {rule}"
