"""Attention with sinks, as gpt-oss has it, in plain torch."""

from __future__ import annotations

import torch

from refit.config.shape import ATTENTION_WINDOW


def attention_with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, layer: int
) -> torch.Tensor:
    """Causal attention of `query`, `key` and `value` `[batch, heads, sequence, size]`, like `query`.

    The softmax of a head has its element of `sinks` `[heads]` as one more score, without a value. Layers 0, 2, ... see
    the last ATTENTION_WINDOW tokens.
    """
    scores = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5
    positions = torch.arange(query.size(-2), device=query.device)
    distance = positions[:, None] - positions
    hidden = distance < 0
    if layer % 2 == 0:
        hidden = hidden | (distance >= ATTENTION_WINDOW)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores.masked_fill(hidden, float("-inf")), sink], dim=-1).softmax(dim=-1)
    return weights[..., :-1] @ value
