"""Initial weights for training: a function of each element's place, the same in every layout and format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from refit.encodings.oracle import PLAIN, OraclePart
from refit.encodings.values import hashed
from refit.memory.rows import Rows, rows_of
from refit.memory.weights import LocalWeights
from refit.plan.sharding import TensorSpec

STANDARD_DEVIATION = 0.02
SPREAD = 2.0
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


def spread(
    memory: LocalWeights,
    number: int,
    source: Mapping[str, TensorSpec],
    moved: Mapping[str, TensorSpec] | None = None,
) -> None:
    """Fill with the `number`th set of weights that a model computes well with: logits spread over a few nats.

    Norms are around 1, all others around 0 with a standard deviation of 2 / sqrt(columns). Values are those that the
    tensors of `source` can hold, and then those of `moved`, which they were refitted to: in any other layout the same.
    """
    for shard in memory:
        tensor = source[shard.tensor.key]
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        for block in rows_of(shard):
            values = hashed(replace(tensor, dtype="float32"), block, number).div_(VALUES_RMS)
            if tensor.key.endswith("norm.weight"):
                values = values.mul_(0.1).add_(1)
            else:
                values = values.mul_(SPREAD / math.sqrt(tensor.shape[-1]))
            values = values.to(dtype)
            if moved is not None:
                values = values.to(getattr(torch, moved[tensor.key].dtype))
            block.data.copy_(values)
