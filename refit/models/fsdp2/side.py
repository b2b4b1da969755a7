"""An FSDP2 side of a refit."""

from __future__ import annotations

import torch

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.errors import RefitError
from refit.models.fsdp2.build import build_model
from refit.models.fsdp2.meshes import build_meshes
from refit.models.fsdp2.weights import read_weights
from refit.models.weights import LocalWeights
from refit.predict.families.names import named_model


class Fsdp2Side:
    """The `ShardedModel` of a transformers model. `module` is None on ranks outside the side."""

    def __init__(self, module: torch.nn.Module | None, weights: LocalWeights | None) -> None:
        self.module = module
        self._weights = weights

    @property
    def weights(self) -> LocalWeights | None:
        return self._weights

    def check_forward(self) -> None:
        """All models of the families run forward on any mesh."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        if self.module is None or self._weights is None:
            return None
        try:
            with torch.no_grad():
                logits: torch.Tensor = self.module(input_ids=tokens.to(self._weights.device)).logits
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error
        return logits.float()


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> Fsdp2Side:
    """Build this rank's part of the scenario's model. Collective: every rank of the job."""
    meshes = build_meshes(side, device)
    if meshes is None:
        return Fsdp2Side(None, None)
    assert scenario.model is not None, "a model provider builds Megatron models only"
    assert side.dtype is not None, "flags that describe a model give its dtype"
    named = named_model(scenario.model, side.dtype)
    module = build_model(scenario.model, named, meshes, getattr(torch, side.dtype.value), device)
    return Fsdp2Side(module, read_weights(module, named))
