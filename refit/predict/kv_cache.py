"""The key-value cache of a token: what an inference engine keeps beside the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from refit.config.layout import Layout
from refit.config.shape import DeltaNet, ModelShape

CACHE_ITEMSIZE = 2
"""Bytes of one cached element: BF16."""


def kv_bytes_per_token(shape: ModelShape, layout: Layout) -> int:
    """Bytes of cache per token on the GPU of the pipeline stage with the most layers that have attention.

    The states of delta nets do not grow with a sequence, and are not counted.
    Multi-latent attention caches the latent and the rotary key, whole on every TP rank (DeepSeek-V2, arXiv:2405.04434,
    table 1). Otherwise each TP rank caches keys and values of its query groups, of at least one.
    """
    cached = [not kind.delta_net for kind in shape.kinds]
    return _most_layers(layout, cached) * kv_bytes_of_layer(shape, layout.tp)


def cache_bytes_of_sequence(shape: ModelShape, layout: Layout, length: int) -> int:
    """Bytes of a sequence of `length` tokens on the fullest GPU: its cache, and at most so much of states."""
    nbytes = kv_bytes_per_token(shape, layout) * length
    if shape.delta_net is not None:
        nbytes += _most_layers(layout, shape.delta_net.layers) * math.ceil(
            delta_state_bytes(shape.delta_net, layout.tp)
        )
    return nbytes


def kv_bytes_of_layer(shape: ModelShape, tp: int) -> int:
    """Bytes of cache per token and layer on a GPU."""
    if shape.mla is not None:
        return (shape.mla.kv_lora_rank + shape.mla.qk_pos_emb_head_dim) * CACHE_ITEMSIZE
    return 2 * max(1, shape.num_query_groups // tp) * shape.kv_channels * CACHE_ITEMSIZE


def delta_state_bytes(net: DeltaNet, tp: int) -> float:
    """Bytes of a delta net's state of one sequence on a GPU."""
    return net.num_value_heads / tp * net.key_head_dim * net.value_head_dim * CACHE_ITEMSIZE


def _most_layers(layout: Layout, counted: Sequence[bool]) -> int:
    """The layers that are `counted` on the stage that has most. What PP does not divide makes some stages one layer
    larger, wherever they are."""
    num_layers = len(counted)
    if (layout.chunk_sizes, layout.first_stage_layers, layout.last_stage_layers) == (None, None, None):
        size = -(-num_layers // layout.pp)
        return max(sum(counted[begin : begin + size]) for begin in range(num_layers - size + 1))
    stages = layout.chunk_layers(num_layers)
    return max(sum(counted[layer] for chunk in chunks for layer in chunk) for chunks in stages)
