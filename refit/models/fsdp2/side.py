"""An FSDP2 side of a refit."""

from __future__ import annotations

import torch

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.models.fsdp2.build import build_model
from refit.models.fsdp2.meshes import build_meshes
from refit.models.fsdp2.weights import held_of
from refit.models.huggingface.side import TransformersSide
from refit.models.huggingface.weights import read_weights
from refit.predict.families.names import named_model


class Fsdp2Side(TransformersSide):
    """The `ShardedModel` of a transformers model whose parameters are DTensors."""


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> Fsdp2Side:
    """Build this rank's part of the scenario's model. Collective: every rank of the job."""
    meshes = build_meshes(side, device)
    if meshes is None:
        return Fsdp2Side(None, None)
    assert scenario.model is not None, "a model provider builds Megatron models only"
    assert side.dtype is not None, "flags that describe a model give its dtype"
    named = named_model(scenario.model, side.dtype)
    module = build_model(scenario.model, named, meshes, getattr(torch, side.dtype.value), device)
    return Fsdp2Side(module, read_weights(module, named, held_of))
