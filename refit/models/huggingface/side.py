"""A side of a refit with a transformers model."""

from __future__ import annotations

import torch

from refit.errors import RefitError
from refit.models.sharded_model import WithoutSteps
from refit.models.weights import LocalWeights


class TransformersSide(WithoutSteps):
    """The `ShardedModel` of a transformers model. `module` is None on ranks outside the side."""

    def __init__(self, module: torch.nn.Module | None, weights: LocalWeights | None) -> None:
        self.module = module
        self._weights = weights

    @property
    def weights(self) -> LocalWeights | None:
        return self._weights

    def check_forward(self) -> None:
        """All models of the families run forward on any ranks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        if self.module is None or self._weights is None:
            return None
        try:
            with torch.no_grad():
                logits = self._all_columns(self.module(input_ids=tokens.to(self._weights.device)).logits)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error
        return logits.float()

    def _all_columns(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of all of the vocabulary, from what this rank's module gives."""
        return logits
