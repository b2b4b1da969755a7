"""ShardedModel: the protocol of one live side of a refit on this rank, for any framework."""

from __future__ import annotations

from typing import Protocol

import torch

from refit.models.weights import LocalWeights


class ShardedModel(Protocol):
    """What the benchmark needs of a side. A row of `FORMATS` names the function that builds one.

    The builder is collective: every rank of the job, including those outside the side. `weights` states what this rank
    holds. The benchmark compares that with the format's prediction, or gathers it where a model provider builds the
    model and nothing can be predicted.
    """

    @property
    def weights(self) -> LocalWeights | None:
        """Views of this rank's parameters and persistent buffers; None on ranks outside the side."""
        ...

    def check_forward(self) -> None:
        """Raise UnavailableError, the same on every rank of the side, where no forward pass can run."""
        ...

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Logits `[batch, sequence, vocab_size]` in float32 for `tokens` `[batch, sequence]`.

        None on ranks without logits and on ranks outside the side. Vocabulary padding is removed.
        Collective: every rank of the side. Raises RefitError where the pass fails.
        """
        ...
