"""Steps of transformers models under FSDP2 and AutoTP: what can run, checked before any model is built, and memory."""

from __future__ import annotations

from collections.abc import Iterator

from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.config.steps import Dispatch, Recompute, StepSettings
from refit.errors import UsageError
from refit.plan.sharding import ITEMSIZE, Sharding
from refit.predict.autotp import AutotpOptions
from refit.predict.fsdp2 import Mesh
from refit.predict.training_memory import GRADIENT_BYTES, TrainingMemory, activation_bytes, parameters_of

MOMENTS_BYTES = 8
"""AdamW's two moments of a parameter, in float32."""

MAIN_BYTES = 4
"""The float32 copy of a parameter of another dtype."""

LAYERS = ".layers."
"""In the keys of all layers' tensors."""


def check_steps(model: ModelShape, side: SideSpec, steps: StepSettings, trains: bool, name: str) -> None:
    """Raise UsageError for steps that an FSDP2 or AutoTP side does not run. Messages call the side `name`."""
    problem = next(_rules(model, side, steps, trains), None)
    if problem is not None:
        raise UsageError(f"{name}: {problem}")


def _rules(model: ModelShape, side: SideSpec, steps: StepSettings, trains: bool) -> Iterator[str]:
    if steps.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {steps.seq_length} is more than the {model.max_position_embeddings} positions of the model: "
            "lower it, or raise --max-position-embeddings"
        )
    if steps.dispatch != Dispatch():
        yield f"{side.format} sides have no token dispatcher of Megatron-Core: leave the --moe-... flags out"
    if trains:
        yield from _training_rules(model, side, steps)


def _training_rules(model: ModelShape, side: SideSpec, steps: StepSettings) -> Iterator[str]:
    options = side.options if isinstance(side.options, AutotpOptions) else None
    if options is not None and options.zero_stage == 0 and side.dtype is not Dtype.FP32:
        # Measured: after two steps its losses differ by 0.2 % from those of stages 1 and 2, FSDP2 and Megatron-Core.
        yield "ZeRO stage 0 trains in 32 bit only here, its 16-bit optimizer gives other losses: give --zero-stage 1"
    if options is not None and options.zero_stage == 0 and side.layout.tp > 1:
        # Measured in float32 with TP2 DP2: after two steps its losses differ by 0.1 % from those of stage 1.
        yield f"ZeRO stage 0 trains with TP 1 only here, TP {side.layout.tp} gives other losses: give --zero-stage 1"
    if options is not None and side.autocast is Dtype.FP16:
        # stage_1_and_2.py of 0.19.8: unscale_and_clip_grads knows nothing of torch_autocast_gradscaler.
        yield "DeepSpeed clips gradients of --autocast with --fp16 while they are still scaled: give --bf16"
    if steps.sequence_parallel:
        yield f"--sequence-parallel is Megatron-Core's, {side.format} sides train without: leave it out"
    yield from _recompute_rules(steps.recompute)
    size, parts = steps.global_batch_size, steps.micro_batch_size * side.layout.dp
    if size % parts:
        yield (
            f"--global-batch-size {size} is not divisible by micro-batch {steps.micro_batch_size} x DP "
            f"{side.layout.dp} = {parts}: give a multiple of {parts}"
        )


def _recompute_rules(recompute: Recompute) -> Iterator[str]:
    rule = "(transformers' GradientCheckpointingLayer)"
    if recompute.granularity == "selective" or recompute.modules:
        yield (
            f"transformers computes whole layers again, no single modules {rule}: give --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 1"
        )
    if recompute.granularity is None and (recompute.method is not None or recompute.num_layers is not None):
        yield "--recompute-method and --recompute-num-layers are for --recompute-granularity full: leave them out"
    if recompute.granularity == "full" and (recompute.method is None or recompute.num_layers is None):
        yield (
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers: give "
            "--recompute-method uniform --recompute-num-layers 1"
        )
    if recompute.method == "uniform" and recompute.num_layers != 1:
        yield (
            f"transformers computes each layer again by itself {rule}, units of {recompute.num_layers} are "
            "Megatron-Core's: give --recompute-num-layers 1"
        )


def fsdp2_memory(
    shape: ModelShape, side: SideSpec, sharding: Sharding, steps: StepSettings
) -> dict[int, TrainingMemory]:
    """The estimate for every rank of an FSDP2 side.

    AdamW's state is that of the rank's own part. Gradients are float32: of that part, or, while several micro-batches
    add up, of all that its shards have together (the estimate takes them as equal). Activations are most as a backward
    pass begins. `fully_shard` has gathered the weights outside layers and those of two layers then; counted with them
    is the output layer's gradient before it is float32.
    """
    assert side.dtype is not None
    itemsize, accumulates = ITEMSIZE[side.dtype.value], steps.num_microbatches(side.layout.dp) > 1
    mesh, found = Mesh.of(side), {}
    for rank in sharding.ranks:
        dense, routed = parameters_of(sharding, rank)
        dense_layers, _ = parameters_of(sharding, rank, LAYERS)
        in_layers = dense_layers * mesh.shard + routed * mesh.expert_shard
        outside, output = (dense - dense_layers) * mesh.shard, shape.vocab_size * shape.hidden_size // side.layout.tp
        gathered = outside + (2 if shape.num_layers > 1 else 1) * in_layers // shape.num_layers
        found[rank] = TrainingMemory(
            gradient_bytes=GRADIENT_BYTES * ((outside + in_layers) if accumulates else dense + routed),
            optimizer_bytes=_state_bytes(side) * (dense + routed),
            activation_bytes=_activation_bytes(shape, side, steps, in_layers),
            unsharded_bytes=itemsize * (gathered + output),
        )
    return found


def autotp_memory(
    shape: ModelShape, side: SideSpec, sharding: Sharding, steps: StepSettings
) -> dict[int, TrainingMemory]:
    """The estimate for every rank of an AutoTP side.

    ZeRO divides AdamW's state over the replicas from stage 1 on, gradients, in the parameters' dtype, from stage 2 on.
    From stage 1 on it copies parameters of float32 too. Its step flattens the gradients of a rank's part and copies
    them to float32, while it holds all three (`step` of DeepSpeed's stage_1_and_2.py).
    """
    assert side.dtype is not None
    itemsize = ITEMSIZE[side.dtype.value]
    stage, replicas = side.options_as(AutotpOptions).zero_stage, side.layout.dp
    assert stage is not None, "a side that trains has an optimizer"
    found = {}
    for rank in sharding.ranks:
        held = sum(parameters_of(sharding, rank))
        found[rank] = TrainingMemory(
            gradient_bytes=itemsize * held // (replicas if stage > 1 else 1),
            optimizer_bytes=(MOMENTS_BYTES + MAIN_BYTES) * held // replicas if stage > 0 else MOMENTS_BYTES * held,
            activation_bytes=_activation_bytes(shape, side, steps, sum(parameters_of(sharding, rank, LAYERS))),
            step_bytes=(2 * itemsize + (MAIN_BYTES if itemsize < MAIN_BYTES else 0)) * held // replicas if stage else 0,
        )
    return found


def _activation_bytes(shape: ModelShape, side: SideSpec, steps: StepSettings, in_layers: int) -> int:
    """Activations as of any side, and what `eager` attention and autocast keep for the backward pass beside them.

    `eager` keeps the scores of all pairs of tokens in the dtype of the products, and their softmax in float32 (in
    float32 both are one); and the keys and values of each head, where others keep those of its group.

    Autocast keeps 16-bit copies of the weights, `in_layers` elements of all layers on this rank and those of the output
    layer; the states after both norms of a layer in float32; and a copy of these for each of the five products that
    read them. Layers that are computed again keep all this one at a time.
    """
    assert side.compute_dtype is not None
    itemsize, tokens = ITEMSIZE[side.compute_dtype.value], steps.micro_batch_size * steps.seq_length
    of_layer = of_output = 0.0
    if side.attn_impl == "eager":
        score_bytes = itemsize + (4 if itemsize < 4 else 0)
        scores = score_bytes * steps.seq_length * shape.num_attention_heads
        repeated = 2 * itemsize * shape.kv_channels * (shape.num_attention_heads - shape.num_query_groups)
        of_layer += tokens * (scores + repeated) / side.layout.tp
    if side.autocast is not None:
        of_layer += itemsize * in_layers / shape.num_layers
        of_layer += (2 * (4 - itemsize) + 3 * itemsize) * tokens * shape.hidden_size
        of_output = itemsize * shape.vocab_size * shape.hidden_size / side.layout.tp
    beside = of_layer * _layers_kept(shape.num_layers, steps.recompute) + of_output
    return activation_bytes(shape, side, steps) + int(beside)


def _layers_kept(num_layers: int, recompute: Recompute) -> int:
    """How many layers keep their states at a time: one of those that are computed again, and all others."""
    if recompute.granularity is None:
        return num_layers
    again = min(recompute.num_layers or 1, num_layers) if recompute.method == "block" else num_layers
    return num_layers - again + 1


def _state_bytes(side: SideSpec) -> int:
    return MOMENTS_BYTES + (0 if side.dtype is Dtype.FP32 else MAIN_BYTES)
