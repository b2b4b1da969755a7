"""Initial weights for training: a function of each element's place, the same in every layout and format."""

from __future__ import annotations

from dataclasses import replace

import torch

from refit.config.quantisation import Quantisation, scale_key
from refit.encodings.fp8.reference import quantise
from refit.encodings.fp8.strips import strips_of
from refit.encodings.values import values
from refit.memory.rows import Rows, rows_of
from refit.memory.weights import LocalShard, LocalWeights

STANDARD_DEVIATION = 0.02
VALUES_RMS = 0.6236
"""Root mean square of the oracle's values: magnitudes 2**e x [1, 2) for e from -7 to 0, all equally likely."""


def initialise(memory: LocalWeights, quantisation: Quantisation | None = None) -> None:
    """Norms are 1, biases 0, all other weights spread around 0 with a standard deviation of 0.02.

    0.02 is Megatron-LM's `--init-method-std`. With `quantisation` the weights that it names get the codes and scales
    of these values.
    """
    coded = {
        shard.tensor.key
        for shard in memory
        if quantisation is not None and quantisation.quantises(shard.tensor.key, shard.tensor.shape)
    }
    scales = {scale_key(key) for key in coded}
    for shard in memory:
        if quantisation is not None and shard.tensor.key in coded:
            for strip in strips_of(memory, shard, quantisation):
                done = quantise(_spread(shard, strip.codes).to(torch.bfloat16), quantisation)
                strip.codes.data.copy_(done.codes)
                strip.scales.copy_(done.scales)
        elif shard.tensor.key not in scales:
            for block in rows_of(shard):
                _fill(shard, block)


def _fill(shard: LocalShard, block: Rows) -> None:
    if shard.tensor.key.endswith("norm.weight"):
        block.data.fill_(1)
    elif shard.tensor.key.endswith("bias"):
        block.data.fill_(0)
    else:
        block.data.copy_(_spread(shard, block))


def _spread(shard: LocalShard, block: Rows) -> torch.Tensor:
    """Float32, whatever the tensor's dtype, so they are the same at every side."""
    return values(replace(shard.tensor, dtype="float32"), block, 0).mul_(STANDARD_DEVIATION / VALUES_RMS)
