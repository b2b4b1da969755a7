"""Estimates what a rank needs beside its weights to train: gradients, optimizer states and activations.

Gradients are float32, and the distributed optimizer keeps 12 bytes per parameter (two moments and the main copy, in
float32) divided over the data-parallel replicas: `compute_weight_and_optimizer_memory` of Megatron-LM's
theoretical_memory_usage.py counts the same 6 + 12 / DP bytes beside bf16 weights.

Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), counted tensor by tensor for latent attention and routed
experts: what the backward pass of each matrix product, norm and activation function reads, in the dtype of the
products. Attention scores are not stored (flash attention). Routed tokens are counted balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refit.config.layout import Layout
from refit.config.registry import FORMATS
from refit.config.shape import DeltaNet, ModelShape
from refit.config.side import SideSpec
from refit.config.steps import Recompute, StepSettings
from refit.plan.sharding import ITEMSIZE, Sharding

GRADIENT_BYTES = 4
OPTIMIZER_BYTES = 12


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on one rank beside its weights.

    `unsharded_bytes` are whole weights that a backward pass has gathered as it begins, and their first gradient.
    `step_bytes` are gradients and their copies at the optimizer's step, after activations are gone.
    """

    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    unsharded_bytes: int = 0
    step_bytes: int = 0

    @property
    def backward_bytes(self) -> int:
        return self.gradient_bytes + self.activation_bytes + self.unsharded_bytes

    @property
    def total_bytes(self) -> int:
        return self.optimizer_bytes + max(self.backward_bytes, self.step_bytes)


def training_memory(
    shape: ModelShape, side: SideSpec, sharding: Sharding, steps: StepSettings
) -> dict[int, TrainingMemory]:
    """The estimate for every rank of a Megatron side."""
    layout = side.layout
    activations = [activation_bytes(shape, side, steps, stage) for stage in range(layout.pp)]
    found = {}
    for rank in sharding.ranks:
        dense, routed = parameters_of(sharding, rank)
        found[rank] = TrainingMemory(
            gradient_bytes=GRADIENT_BYTES * (dense + routed),
            optimizer_bytes=OPTIMIZER_BYTES * dense // layout.dp + OPTIMIZER_BYTES * routed // layout.edp,
            activation_bytes=activations[layout.coordinates(rank).pp],
        )
    return found


def parameters_of(sharding: Sharding, rank: int, within: str = "") -> tuple[int, int]:
    """Elements that this rank holds of dense layers and of routed experts, of the keys with `within` in them."""
    dense = routed = 0
    for key, shard in sharding.of_rank(rank).shards.items():
        if within not in key:
            continue
        volume = sum(box.volume for box in shard.boxes)
        if ".experts." in key and "shared_experts" not in key:
            routed += volume
        else:
            dense += volume
    return dense, routed


def activation_bytes(shape: ModelShape, side: SideSpec, steps: StepSettings, stage: int = 0) -> int:
    """Activations of the micro-batches in flight on a pipeline stage.

    1F1B has pp - stage of them in flight (Narayanan et al. 2021, section 2.2); with v chunks per rank the first stage
    has 1 + (pp - 1) / (pp v) times as many (Korthikanti et al., section 4.2.3).
    """
    layout, num_microbatches = side.layout, steps.num_microbatches(side.layout.dp)
    tokens = steps.micro_batch_size * steps.seq_length
    assert side.compute_dtype is not None
    itemsize = ITEMSIZE[side.compute_dtype.value]
    chunks = layout.chunk_layers(shape.num_layers)[stage]
    units = [unit for chunk in chunks for unit in _units(chunk, steps.recompute)]
    whole = {layer for chunk in chunks for layer in chunk} - {layer for unit in units for layer in unit}
    net_parts = 1 if FORMATS[side.format].is_transformers else layout.tp  # whose ranks compute all of a delta net
    per_microbatch = sum(_layer_values(shape, layer, layout, steps, net_parts) for layer in whole)
    per_microbatch += len(units) * shape.hidden_size / _sequence_parts(layout, steps)
    in_flight = float(min(layout.pp - stage, num_microbatches))
    if layout.vpp > 1:
        in_flight = min(in_flight * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)), num_microbatches)
    stored = in_flight * per_microbatch
    # One unit at a time is computed again.
    again = (sum(_all_values(shape, layer, layout, steps, net_parts) for layer in unit) for unit in units)
    stored += max(again, default=0.0)
    total = stored * tokens * itemsize
    if stage == layout.pp - 1:  # logits, their softmax in float32, and the gradient of the logits
        total += tokens * (2 * itemsize + 4) * shape.padded_vocab_size(layout.tp) / layout.tp
    return int(total)


def _units(chunk: Sequence[int], recompute: Recompute) -> list[Sequence[int]]:
    """The layers of a chunk that are computed again together, from one stored input: units of all layers (`uniform`),
    or each of the first ones (`block`)."""
    if recompute.granularity != "full":
        return []
    number = recompute.num_layers or 1
    if recompute.method == "block":
        return [[layer] for layer in chunk[:number]]
    return [chunk[begin : begin + number] for begin in range(0, len(chunk), number)]


def _layer_values(shape: ModelShape, layer: int, layout: Layout, steps: StepSettings, net_parts: int) -> float:
    """Values that a layer stores for each token, after selective recomputation."""
    recompute = steps.recompute
    values = _all_values(shape, layer, layout, steps, net_parts)
    if recompute.granularity != "selective":
        return values
    routed = shape.experts is not None and shape.experts.layers[layer]
    hidden = shape.hidden_size / _sequence_parts(layout, steps)
    if routed and "moe" in recompute.modules:
        values -= _moe_values(shape, layout, steps)
    if not routed and "mlp" in recompute.modules:
        values -= _mlp_values(shape.hidden_size, shape.ffn_hidden_size, layout.tp, shape)
    if "layernorm" in recompute.modules:
        values -= 2 * hidden
    return max(values, hidden)


def _all_values(shape: ModelShape, layer: int, layout: Layout, steps: StepSettings, net_parts: int) -> float:
    """Values of a layer for each token: two norms and what follows them, without recomputation. A delta net is cut into
    `net_parts`."""
    hidden = shape.hidden_size / _sequence_parts(layout, steps)
    if shape.experts is not None and shape.experts.layers[layer]:
        mlp = _moe_values(shape, layout, steps)
    else:
        mlp = _mlp_values(shape.hidden_size, shape.ffn_hidden_size, layout.tp, shape)
    net = shape.delta_net
    if net is not None and net.layers[layer]:
        return 4 * hidden + _delta_net_values(net) / net_parts + mlp
    return 4 * hidden + _attention_values(shape, layout) + mlp


def _delta_net_values(net: DeltaNet) -> float:
    """What is projected and convolved, queries and keys for each value head, the output before and after its norm."""
    projected = 2 * net.key_width + 2 * net.value_width + 2 * net.num_value_heads
    convolved = 2 * net.key_width + net.value_width
    return projected + convolved + 2 * net.num_value_heads * net.key_head_dim + 2 * net.value_width


def _attention_values(shape: ModelShape, layout: Layout) -> float:
    """Queries, keys, values and output of this rank's heads, and latent states where there are any."""
    heads, mla = shape.num_attention_heads / layout.tp, shape.mla
    if mla is None:
        groups = max(shape.num_query_groups / layout.tp, 1)
        return shape.kv_channels * ((2 + shape.attention_output_gate) * heads + 2 * groups)
    query, value = mla.qk_head_dim + mla.qk_pos_emb_head_dim, mla.v_head_dim
    latent = 2 * ((mla.q_lora_rank or 0) + mla.kv_lora_rank) + mla.qk_pos_emb_head_dim
    return latent + heads * (2 * query + 2 * value)


def _mlp_values(width: int, ffn: int, tp: int, shape: ModelShape) -> float:
    """The intermediate states of an MLP: before (gate and up) and after the activation function."""
    return (3 if shape.swiglu else 2) * ffn / tp


def _moe_values(shape: ModelShape, layout: Layout, steps: StepSettings) -> float:
    """Router scores, dispatched tokens before and after the experts, their intermediate states, shared experts."""
    experts = shape.experts
    assert experts is not None
    parts = _sequence_parts(layout, steps)
    width = experts.latent_size or shape.hidden_size
    # A token of this rank goes to topk experts, and as many come here. ETP ranks all receive the tokens of a group.
    copies = experts.topk / parts * layout.etp
    routed = copies * (2 * width + _mlp_values(width, experts.ffn_hidden_size, layout.etp, shape))
    shared = _mlp_values(shape.hidden_size, experts.shared_ffn_hidden_size or 0, layout.tp, shape)
    return routed + shared + 2 * experts.num_experts / parts


def _sequence_parts(layout: Layout, steps: StepSettings) -> int:
    """Into how many parts sequence parallelism cuts what is not cut by heads or columns."""
    return layout.tp if steps.sequence_parallel else 1
