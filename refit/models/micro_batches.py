"""Divides the batch of a step over data-parallel replicas and micro-batches."""

from __future__ import annotations

import torch
import torch.distributed as dist

from refit.config.layout import Layout


def replica_part(tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The rows of `tokens` `[batch, sequence]` that the replica of this rank gets; `batch` is a multiple of DP."""
    return tokens.chunk(layout.dp)[layout.coordinates(dist.get_rank()).dp]


def micro_batches(tokens: torch.Tensor, layout: Layout, size: int) -> list[torch.Tensor]:
    """This replica's part of the global batch, `[size, sequence]` each."""
    return list(torch.split(replica_part(tokens, layout), size))
