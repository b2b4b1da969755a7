"""A model for `--model-provider`: a dense GPTModel with a value head, as reinforcement learning uses it.

    torchrun --nproc-per-node 8 benchmark_refit.py --model-provider examples.custom_model:build ...

`build` is called on every rank of each side. The benchmark reads the sharding from the model's `sharded_state_dict()`,
so the extra layers need no registration.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from refit.config.layout import Layout
from refit.models.megatron.layers import CoreAttention

VALUE_BINS = 48


class ValueModel(GPTModel):
    """A GPTModel whose last stage also predicts a distribution over returns, from a vector of feature scales."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, **arguments: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **arguments)
        if self.post_process:
            self.value_head = ColumnParallelLinear(
                config.hidden_size,
                VALUE_BINS,
                config=config,
                init_method=torch.nn.init.zeros_,
                bias=True,
                gather_output=True,
                tp_group=pg_collection.tp,
            )
            self.register_buffer("value_scale", torch.ones(config.hidden_size, dtype=torch.float32))


def build(layout: Layout, groups: Any, device: torch.device) -> torch.nn.Module:
    """This rank's part of the model on Megatron's `groups` (a ProcessGroupCollection)."""
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=192,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
    )
    stage = torch.distributed.get_rank(groups.pp)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", pp_rank=stage)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return ValueModel(
        config,
        groups,
        transformer_layer_spec=spec,
        vocab_size=512,
        max_sequence_length=128,
        pre_process=stage == 0,
        post_process=stage == layout.pp - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).to(device)
