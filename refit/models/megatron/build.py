"""Builds Megatron-Core's GPTModel for a shape and a layout, on any consecutive ranks, on CPUs and GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from refit.config.layout import Layout
from refit.config.shape import Experts, ModelShape
from refit.config.side import SideSpec
from refit.errors import UnavailableError, UsageError
from refit.models.megatron import compat
from refit.models.megatron.layers import CoreAttention, GroupedExperts


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A rank's part of a model, in eval mode: one chunk, or several where pipeline stages interleave.

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


def build_model(shape: ModelShape, side: SideSpec, groups: Any, *, device: torch.device | str) -> BuiltModel | None:
    """Build this rank's part; None where `groups` (of `build_groups`) is None: the rank is outside the side.

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
    stage = layout.coordinates(torch.distributed.get_rank()).pp
    with compat.on_device(device), compat.quiet():
        config = transformer_config(shape, side)
        module = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(shape, config, groups, stage, side.transformer_impl),
            vocab_size=shape.padded_vocab_size(layout.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == layout.pp - 1,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type=shape.position_embedding_type,
            parallel_output=False,
            pg_collection=groups,
        ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # torch's norms are built in float32 on the CPU, whatever the config says. Buffers (expert_bias) stay
            # float32.
            parameter.data = parameter.data.to(device, config.params_dtype)
    return BuiltModel((module,), groups, layout, shape)


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


def transformer_config(shape: ModelShape, side: SideSpec) -> Any:
    """Megatron's config for this model in this layout, for inference and without weight initialisation."""
    assert side.dtype is not None, "flags that describe a model give its dtype"
    layout, dtype = side.layout, getattr(torch, side.dtype.value)
    values: dict[str, object] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "normalization": shape.normalization,
        "gated_linear_unit": shape.swiglu,
        "activation_func": F.silu if shape.swiglu else F.gelu,
        "add_bias_linear": shape.add_bias_linear,
        "add_qkv_bias": shape.add_qkv_bias,
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
    if layout.pp > 1:
        values["num_layers_in_first_pipeline_stage"] = layout.first_stage_layers
        values["num_layers_in_last_pipeline_stage"] = layout.last_stage_layers
    values.update(_without_initialisation())
    if shape.experts is not None:
        values.update(_expert_fields(shape.experts))
    if shape.mla is None:
        values |= {"num_query_groups": shape.num_query_groups, "kv_channels": shape.kv_channels}
        return TransformerConfig(**compat.known_fields(TransformerConfig, values))
    values |= {
        "multi_latent_attention": True,
        "q_lora_rank": shape.mla.q_lora_rank,
        "kv_lora_rank": shape.mla.kv_lora_rank,
        "qk_head_dim": shape.mla.qk_head_dim,
        "qk_pos_emb_head_dim": shape.mla.qk_pos_emb_head_dim,
        "v_head_dim": shape.mla.v_head_dim,
    }
    return MLATransformerConfig(**compat.known_fields(MLATransformerConfig, values))


def _without_initialisation() -> dict[str, object]:
    """Leave weights as allocated: a refit overwrites them. `perform_initialization=False` would also leave out the
    attributes that Megatron's own refit reads (0.16.1)."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    methods = ("init_method", "output_layer_init_method", "embedding_init_method")
    return {"use_cpu_initialization": False, "perform_initialization": True, **dict.fromkeys(methods, keep)}


def _expert_fields(experts: Experts) -> dict[str, object]:
    # The all-to-all dispatcher needs CUDA streams, the all-gather one does not. Weights do not depend on it.
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_layer_freq": [int(routed) for routed in experts.layers],
        "moe_router_enable_expert_bias": experts.expert_bias,
        "moe_router_score_function": "sigmoid" if experts.expert_bias else "softmax",
        "moe_router_pre_softmax": experts.topk == 1 and not experts.expert_bias,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": experts.grouped_gemm,
    }


def _block_spec(shape: ModelShape, config: Any, groups: Any, stage: int, transformer_impl: str) -> Any:
    local = transformer_impl == "local"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization=shape.normalization, pp_rank=stage
    )
    grouped = GroupedExperts if shape.experts is not None and shape.experts.grouped_gemm else None
    for layer in spec.layer_specs:
        if local:
            compat.replace_parts(layer, groups, CoreAttention, grouped)
        else:
            compat.pass_query_group(layer, groups)
    return spec
