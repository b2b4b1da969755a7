"""Keeps a copy of one side's weights in the host's memory while its own memory is filled with other values."""

from __future__ import annotations

import torch

from refit.memory.weights import LocalWeights


class SavedWeights:
    """A copy of all shards of a side on this rank; empty on ranks outside the side."""

    def __init__(self, weights: LocalWeights | None) -> None:
        self._copies = [shard.view.to("cpu", copy=True) for shard in weights or ()]

    def restore(self, weights: LocalWeights | None) -> None:
        """Write the copy back."""
        with torch.no_grad():
            for shard, copy in zip(weights or (), self._copies, strict=True):
                shard.view.copy_(copy)
