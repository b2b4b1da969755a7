"""Initial weights for training: a function of each element's place, the same in every layout and format."""

from __future__ import annotations

from refit.bench import oracle
from refit.models.weights import LocalWeights

STANDARD_DEVIATION = 0.02
ORACLE_RMS = 0.6236
"""Root mean square of the oracle's values: magnitudes 2**e x [1, 2) for e from -7 to 0, all equally likely."""


def initialise(memory: LocalWeights) -> None:
    """Norms are 1, biases 0, all other weights spread around 0 with a standard deviation of 0.02.

    0.02 is Megatron-LM's `--init-method-std`.
    """
    for shard, block, values in oracle.spread(memory):
        name = shard.tensor.key
        if name.endswith("norm.weight"):
            block.fill_(1)
        elif name.endswith("bias"):
            block.fill_(0)
        else:
            block.copy_(values.mul_(STANDARD_DEVIATION / ORACLE_RMS))
