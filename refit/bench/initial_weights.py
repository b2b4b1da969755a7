"""Initial weights for training: a function of each element's place, the same in every layout and format."""

from __future__ import annotations

from dataclasses import replace

import torch

from refit.encodings.oracle import PLAIN, OraclePart
from refit.encodings.values import hashed
from refit.memory.rows import Rows
from refit.memory.weights import LocalWeights
from refit.plan.sharding import TensorSpec

STANDARD_DEVIATION = 0.02
VALUES_RMS = 0.6236
"""Root mean square of the oracle's values: magnitudes 2**e x [1, 2) for e from -7 to 0, all equally likely."""


def initialise(memory: LocalWeights, part: OraclePart = PLAIN) -> None:
    """Norms are 1, biases 0, all other weights spread around 0 with a standard deviation of 0.02.

    0.02 is Megatron-LM's `--init-method-std`. A destination of encodings, whose `part` of the oracle this is, gets what
    a refit would make of these values.
    """
    tensors = {shard.tensor.key: shard.tensor for shard in memory}
    for shard in memory:
        for each in part.comparisons(_initial, memory, shard, tensors):
            each.found.copy_(each.expected)


def _initial(tensor: TensorSpec, block: Rows) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if tensor.key.endswith("norm.weight"):
        return torch.ones_like(block.data, dtype=dtype)
    if tensor.key.endswith("bias"):
        return torch.zeros_like(block.data, dtype=dtype)
    # Float32, whatever the tensor's dtype, so they are the same at every side.
    spread = hashed(replace(tensor, dtype="float32"), block, 0).mul_(STANDARD_DEVIATION / VALUES_RMS)
    return spread.to(dtype)
