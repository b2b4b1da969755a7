"""A Megatron-Core side of a refit."""

from __future__ import annotations

import torch

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.models.megatron.build import BuiltModel, build_model
from refit.models.megatron.forward import forward_logits
from refit.models.megatron.groups import build_groups
from refit.models.megatron.provider import build_from_provider, load_provider
from refit.models.megatron.sharding import read_weights
from refit.models.weights import LocalWeights


class MegatronSide:
    """The `ShardedModel` of a GPTModel. `built` is None on ranks outside the side."""

    def __init__(self, built: BuiltModel | None) -> None:
        self.built = built
        self._weights = read_weights(built) if built is not None else None

    @property
    def weights(self) -> LocalWeights | None:
        return self._weights

    def check_forward(self) -> None:
        """Every model that is built here runs forward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor | None:
        return forward_logits(self.built, tokens) if self.built is not None else None


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> MegatronSide:
    """Build this rank's part of the scenario's model, or of the provider's model where one is named.

    Collective: every rank of the job. Raises UnavailableError where the model cannot be built here.
    """
    groups = build_groups(side.layout)
    if scenario.model is not None:
        return MegatronSide(build_model(scenario.model, side, groups, device=device))
    provider = load_provider(scenario.model_provider or "")
    return MegatronSide(build_from_provider(provider, side.layout, groups, device))
