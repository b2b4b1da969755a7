"""A Megatron-Core side of a refit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.models.forward_pass import ForwardPass
from refit.models.megatron.build import BuiltModel, build_model
from refit.models.megatron.dispatchers import check_live, live_dispatcher
from refit.models.megatron.forward import forward_pass, run_forward
from refit.models.megatron.groups import build_groups
from refit.models.megatron.provider import build_from_provider, load_provider
from refit.models.megatron.sharding import read_weights
from refit.models.megatron.training import MegatronTrainer
from refit.models.sharded_model import LiveSettings


class MegatronSide:
    """The `ShardedModel` of a GPTModel. `built` is None on ranks outside the side."""

    def __init__(self, built: BuiltModel | None, trainer: MegatronTrainer | None = None) -> None:
        self.built = built
        self.trainer = trainer
        self.weights = read_weights(built) if built is not None else None

    @property
    def settings(self) -> LiveSettings:
        return LiveSettings(live_dispatcher(self.built), _config_text(self.built)) if self.built else LiveSettings()

    def check_forward(self) -> None:
        """Every model that is built here runs forward."""

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        return forward_pass(self.built, tokens, replayed) if self.built is not None else ForwardPass()

    def prepare_infer(self) -> None:
        """Passes compute with the weights themselves."""

    def infer(self, tokens: torch.Tensor) -> None:
        if self.built is not None:
            run_forward(self.built, tokens)


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> MegatronSide:
    """Build this rank's part of the scenario's model, or of the provider's model where one is named.

    Collective: every rank of the job. Raises UnavailableError where the model cannot be built here, and RefitError
    where it has another dispatcher than the one asked for.
    """
    groups = build_groups(side.layout, scenario.model)
    if scenario.model is None:
        provider = load_provider(scenario.model_provider or "")
        return MegatronSide(build_from_provider(provider, side.layout, groups, device))
    steps = scenario.steps_of(name)
    built = build_model(scenario.model, side, groups, device=device, steps=steps)
    if built is None or steps is None:
        return MegatronSide(built)
    check_live(built, steps.dispatch)
    return MegatronSide(built, MegatronTrainer(built, steps) if scenario.trains(name) else None)


def _config_text(built: BuiltModel) -> dict[str, str]:
    """Every field of Megatron's config. Functions are left out: their text has an address."""
    config: Any = built.chunks[0].config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: str(value) for name, value in sorted(values.items()) if not callable(value)}
