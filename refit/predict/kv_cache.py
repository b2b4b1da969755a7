"""The key-value cache of a token: what an inference engine keeps beside the weights."""

from __future__ import annotations

from refit.config.layout import Layout
from refit.config.shape import ModelShape

CACHE_ITEMSIZE = 2
"""Bytes of one cached element: BF16."""


def kv_bytes_per_token(shape: ModelShape, layout: Layout) -> int:
    """Bytes of cache per token on the GPU of the pipeline stage with the most layers.

    Multi-latent attention caches the latent and the rotary key, whole on every TP rank (DeepSeek-V2, arXiv:2405.04434,
    table 1). Otherwise each TP rank caches keys and values of its query groups, of at least one.
    """
    return _most_layers(layout, shape.num_layers) * kv_bytes_of_layer(shape, layout.tp)


def kv_bytes_of_layer(shape: ModelShape, tp: int) -> int:
    """Bytes of cache per token and layer on a GPU."""
    if shape.mla is not None:
        return (shape.mla.kv_lora_rank + shape.mla.qk_pos_emb_head_dim) * CACHE_ITEMSIZE
    return 2 * max(1, shape.num_query_groups // tp) * shape.kv_channels * CACHE_ITEMSIZE


def _most_layers(layout: Layout, num_layers: int) -> int:
    """The layers of the largest stage. What PP does not divide makes some stages one layer larger."""
    if (layout.chunk_sizes, layout.first_stage_layers, layout.last_stage_layers) == (None, None, None):
        return -(-num_layers // layout.pp)
    return max(sum(map(len, chunks)) for chunks in layout.chunk_layers(num_layers))
