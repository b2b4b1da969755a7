"""An FSDP2 side of a refit."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.models.fsdp2.build import build_model
from refit.models.fsdp2.meshes import build_meshes
from refit.models.fsdp2.training import Fsdp2Trainer
from refit.models.fsdp2.weights import held_of
from refit.models.huggingface.side import TransformersSide
from refit.models.huggingface.weights import read_weights
from refit.models.process_groups import own_group
from refit.predict.families.names import named_model


class Fsdp2Side(TransformersSide):
    """The `ShardedModel` of a transformers model whose parameters are DTensors."""

    def _all_columns(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.full_tensor() if isinstance(logits, DTensor) else logits


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> Fsdp2Side:
    """Build this rank's part of the scenario's model. Collective: every rank of the job."""
    meshes, group = build_meshes(side, device), own_group([list(side.ranks)])
    if meshes is None or group is None:
        return Fsdp2Side(side)
    assert scenario.model is not None, "a model provider builds Megatron models only"
    assert side.dtype is not None, "flags that describe a model give its dtype"
    named = named_model(scenario.model, side.dtype)
    module = build_model(scenario.model, named, meshes, side, device)
    trainer = None
    if scenario.trains(name):
        assert scenario.steps is not None
        trainer = Fsdp2Trainer(module, meshes, group, side, scenario.steps, device)
    return Fsdp2Side(side, module, read_weights(module, named, held_of), trainer)
