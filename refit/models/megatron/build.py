"""Builds Megatron-Core's GPTModel for a shape and a layout, on any consecutive ranks, on CPUs and GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from refit.config.layout import Layout
from refit.config.shape import (
    ATTENTION_WINDOW,
    GEGLU_LIMIT,
    GEGLU_OFFSET,
    ROTARY_BASE,
    DeltaNet,
    Experts,
    ModelShape,
)
from refit.config.side import SideSpec
from refit.config.steps import StepSettings
from refit.errors import UnavailableError, UsageError
from refit.models.megatron import compat, compat_steps, delta_nets
from refit.models.megatron.layers import CoreAttention, DuplicatedLinear, GroupedExperts, KeyNorm, QueryNorm


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A rank's part of a model, in eval mode: one chunk, or with virtual pipeline stages several, in their order.

    `groups` is Megatron's ProcessGroupCollection. `shape` is None for a model from a provider.
    """

    chunks: tuple[torch.nn.Module, ...]
    groups: Any
    layout: Layout
    shape: ModelShape | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The only chunk. Raises UsageError where there are several."""
        if len(self.chunks) != 1:
            raise UsageError(f"this rank holds {len(self.chunks)} chunks of the model, one is needed here")
        return self.chunks[0]

    @property
    def device(self) -> torch.device:
        parameters = (parameter for chunk in self.chunks for parameter in chunk.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))


def build_model(
    shape: ModelShape, side: SideSpec, groups: Any, *, device: torch.device | str, steps: StepSettings | None = None
) -> BuiltModel | None:
    """Build this rank's part; None where `groups` (of `build_groups`) is None: the rank is outside the side.

    `steps` are the settings of the steps that the model will run, None for a model that is only refitted and checked.
    Weights are not initialised. Collective: every rank of the layout, where embeddings are tied over stages. Raises
    UnavailableError where the side's layers cannot be built here.
    """
    device, layout = torch.device(device), side.layout
    check_transformer_impl(side.transformer_impl, device)
    compat.check_latent_query_norm(shape)
    if groups is None:
        return None
    # No random numbers are drawn without initialisation. The inference tracker works without CUDA.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    with (
        compat.running_on(groups, device, layout.vpp),
        compat_steps.trainable_on(device),
        delta_nets.norms_add_one(),
        compat_steps.norms_know_sequence_parallel(),
    ):
        chunks = tuple(_build_chunk(shape, side, groups, number, steps) for number in range(layout.vpp))
    with torch.no_grad():
        for parameter in itertools.chain(*(chunk.parameters() for chunk in chunks)):
            # torch's norms are built in float32 on the CPU, whatever the config says. Buffers (expert_bias) stay
            # float32.
            parameter.data = parameter.data.to(device, _torch_dtype(side))
    _share_word_embedding(chunks)
    return BuiltModel(chunks, groups, layout, shape)


def _build_chunk(
    shape: ModelShape, side: SideSpec, groups: Any, number: int, steps: StepSettings | None
) -> torch.nn.Module:
    """This rank's model chunk number `number`: its embedding, layers and output layer, as far as they lie there."""
    layout, config = side.layout, transformer_config(shape, side, steps)
    stage = layout.coordinates(torch.distributed.get_rank()).pp
    local = side.transformer_impl == "local"
    place = {"vp_stage": number if layout.vpp > 1 else None, "pp_rank": stage}
    chunk_number, last = number * layout.pp + stage, layout.pp * layout.vpp - 1
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization=shape.normalization, **place
    )
    predicts = shape.mtp_num_layers > 0 and chunk_number == layout.prediction_chunk
    layers = spec
    if predicts and not spec.layer_specs:
        # A prediction layer is of the last decoder layer's kind, which this chunk does not hold.
        every = get_gpt_decoder_layer_specs(config, not local, normalization=shape.normalization)
        layers = dataclasses.replace(spec, layer_specs=every[-1:])
    if local:
        experts = GroupedExperts if shape.experts is not None and shape.experts.grouped_gemm else None
        for layer in layers.layer_specs:
            compat.replace_parts(layer, CoreAttention, experts)
    if shape.qk_norm_over_heads:
        for layer in layers.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    if shape.delta_net is not None:
        held = layout.chunk_layers(shape.num_layers)[stage][number] or (shape.num_layers - 1,)
        nets = [shape.delta_net.layers[layer] for layer in held]
        layers = delta_nets.in_place_of_attention(layers, nets, config, local)
        spec = layers if spec.layer_specs else spec
    mtp_spec = None
    if predicts:
        mtp_spec = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=not local, **place)
    with compat.latent_projections(DuplicatedLinear) if local else contextlib.nullcontext():
        chunk: torch.nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=shape.padded_vocab_size(layout.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=chunk_number == 0,
            post_process=chunk_number == last,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type=shape.position_embedding_type,
            parallel_output=True,
            mtp_block_spec=mtp_spec,
            pg_collection=groups,
            vp_stage=place["vp_stage"],
        ).eval()
    return chunk


def _share_word_embedding(chunks: Sequence[Any]) -> None:
    """Let all chunks of a rank have one word embedding, as the first stage's, where its last chunk predicts tokens.

    Megatron keeps equal copies there. Its ranks state the embedding once for each.
    """
    holders = [chunk.embedding.word_embeddings for chunk in chunks if hasattr(chunk, "embedding")]
    for holder in holders[1:]:
        holder.weight = holders[0].weight


def check_transformer_impl(transformer_impl: str, device: torch.device) -> None:
    """Raise UnavailableError where these layers cannot be built on `device`, UsageError for an unknown name."""
    if transformer_impl not in ("local", "transformer_engine"):
        raise UsageError(f"unknown transformer implementation {transformer_impl!r}: choose local or transformer_engine")
    if transformer_impl == "local":
        return
    if device.type != "cuda":
        raise UnavailableError(
            f"Transformer Engine layers need CUDA, the device is {device}: use --transformer-impl local"
        )
    if not compat.has_transformer_engine():
        raise UnavailableError(
            "Transformer Engine is not installed: pip install 'transformer-engine[pytorch]', or use "
            "--transformer-impl local"
        )


def transformer_config(shape: ModelShape, side: SideSpec, steps: StepSettings | None = None) -> Any:
    """Megatron's config for this model in this layout, without weight initialisation; for inference without `steps`."""
    layout, dtype = side.layout, _torch_dtype(side)
    values: dict[str, object] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "normalization": shape.normalization,
        "layernorm_epsilon": shape.norm_epsilon,
        "rotary_base": ROTARY_BASE,
        "gated_linear_unit": shape.swiglu,
        "activation_func": quick_gelu if shape.quick_geglu else F.silu if shape.swiglu else F.gelu,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
        "attention_output_gate": shape.attention_output_gate,
        "layernorm_zero_centered_gamma": shape.norms_add_one,
        "qk_layernorm": shape.qk_layernorm,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": False,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "transformer_impl": side.transformer_impl,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if shape.quick_geglu:
        values |= {"glu_linear_offset": GEGLU_OFFSET, "activation_func_clamp_value": GEGLU_LIMIT}
    if shape.attention_sinks:
        values |= {
            "softmax_type": "learnable",
            "window_size": (ATTENTION_WINDOW - 1, 0),
            "window_attn_skip_freq": 2,
        }
    if shape.delta_net is not None:
        values |= _delta_net_fields(shape.delta_net)
    if shape.mtp_num_layers:
        values["mtp_num_layers"] = shape.mtp_num_layers
    values.update(_stage_fields(layout, shape.mtp_num_layers))
    values.update(_without_initialisation())
    if shape.experts is not None:
        values.update(_expert_fields(shape.experts, shape.softmax_over_all))
    if steps is not None:
        values.update(_step_fields(steps, routed=shape.experts is not None))
    if shape.mla is None:
        values |= {"num_query_groups": shape.num_query_groups, "kv_channels": shape.kv_channels}
        return TransformerConfig(**compat.known_fields(TransformerConfig, values))
    values |= {
        "multi_latent_attention": True,
        "rope_type": "rope",
        "q_lora_rank": shape.mla.q_lora_rank,
        "kv_lora_rank": shape.mla.kv_lora_rank,
        "qk_head_dim": shape.mla.qk_head_dim,
        "qk_pos_emb_head_dim": shape.mla.qk_pos_emb_head_dim,
        "v_head_dim": shape.mla.v_head_dim,
    }
    return MLATransformerConfig(**compat.known_fields(MLATransformerConfig, values))


def _stage_fields(layout: Layout, mtp_num_layers: int) -> dict[str, object]:
    """What Megatron is told of pipeline stages."""
    values: dict[str, object] = {}
    if layout.vpp > 1:
        # As Megatron-LM's arguments.py has it: in one batch, two stages would mix up what they send forward and back.
        values |= {
            "virtual_pipeline_model_parallel_size": layout.vpp,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if layout.pp > 1:
        values["num_layers_in_first_pipeline_stage"] = layout.first_stage_layers
        values["num_layers_in_last_pipeline_stage"] = layout.last_stage_layers
    if layout.chunk_sizes is not None:
        values["pipeline_model_parallel_layout"] = _pipeline_layout(
            layout.chunk_sizes, layout.prediction_chunk, mtp_num_layers
        )
    return values


def _pipeline_layout(chunk_sizes: tuple[int, ...], prediction_chunk: int, mtp_num_layers: int) -> list[list[str]]:
    """Megatron's list of what every model chunk holds (PipelineParallelLayerLayout)."""
    chunks = [["decoder"] * size for size in chunk_sizes]
    chunks[0].insert(0, "embedding")
    chunks[prediction_chunk] += ["mtp"] * mtp_num_layers
    chunks[-1].append("loss")
    return chunks


def _step_fields(steps: StepSettings, routed: bool) -> dict[str, object]:
    recompute, dispatch = steps.recompute, steps.dispatch
    values: dict[str, object] = {
        "sequence_parallel": steps.sequence_parallel,
        "recompute_granularity": recompute.granularity,
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
        "recompute_modules": list(recompute.modules) or None,
    }
    if not routed:
        return values
    values |= {
        "moe_token_dispatcher_type": dispatch.dispatcher,
        "overlap_moe_expert_parallel_comm": dispatch.overlap,
        "delay_wgrad_compute": dispatch.delay_wgrad,
        "moe_router_force_load_balancing": dispatch.balanced,
        "moe_router_dtype": dispatch.router_dtype,
    }
    if dispatch.backend:
        values["moe_flex_dispatcher_backend"] = dispatch.backend
    if dispatch.rank_capacity:
        values["moe_expert_rank_capacity_factor"] = dispatch.rank_capacity
    return values


def _torch_dtype(side: SideSpec) -> torch.dtype:
    assert side.dtype is not None, "flags that describe a model give its dtype"
    dtype: torch.dtype = getattr(torch, side.dtype.value)
    return dtype


def _without_initialisation() -> dict[str, object]:
    """Leave weights as allocated: a refit overwrites them. `perform_initialization=False` would also leave out the
    attributes that Megatron's own refit reads (0.16.1)."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    methods = ("init_method", "output_layer_init_method", "embedding_init_method")
    return {"use_cpu_initialization": False, "perform_initialization": True, **dict.fromkeys(methods, keep)}


def _delta_net_fields(net: DeltaNet) -> dict[str, object]:
    # Not `experimental_attention_variant`: with it, Megatron's block specs refuse local layers.
    return {
        "linear_num_key_heads": net.num_key_heads,
        "linear_key_head_dim": net.key_head_dim,
        "linear_num_value_heads": net.num_value_heads,
        "linear_value_head_dim": net.value_head_dim,
        "linear_conv_kernel_dim": net.conv_kernel_dim,
    }


def _expert_fields(experts: Experts, softmax_over_all: bool) -> dict[str, object]:
    # Weights do not depend on the dispatcher. That of a step replaces this one.
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_layer_freq": [int(routed) for routed in experts.layers],
        "moe_router_enable_expert_bias": experts.expert_bias,
        "moe_router_score_function": "sigmoid" if experts.expert_bias else "softmax",
        "moe_router_pre_softmax": softmax_over_all,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": experts.grouped_gemm,
        "moe_latent_size": experts.latent_size,
        "moe_shared_expert_gate": experts.shared_gate,
    }
