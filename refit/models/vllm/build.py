"""Builds a side of vLLM's: tensors of its layout, or those of an engine that runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.models.sharded_model import ShardedModel
from refit.models.vllm import side as tensors
from refit.models.vllm.engine import side as running


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> ShardedModel:
    """This rank's part. Collective: every rank of the job."""
    build: Callable[..., ShardedModel] = tensors.build_side if side.running_engine is None else running.build_side
    return build(scenario, name, side, device)
