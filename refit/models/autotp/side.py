"""A DeepSpeed AutoTP side of a refit."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.memory.weights import LocalWeights
from refit.models.autotp.engine import build_engine, whole_model
from refit.models.autotp.groups import ParallelGroups, build_groups
from refit.models.autotp.training import AutotpTrainer
from refit.models.autotp.weights import held_of, metadata_of
from refit.models.huggingface.side import TransformersSide
from refit.models.huggingface.weights import read_weights
from refit.predict.families.names import named_model


class AutotpSide(TransformersSide):
    """The `ShardedModel` of a DeepSpeedEngine. `engine` and `groups` are None on ranks outside the side.

    Weights are the model's parameters, at ZeRO stages 1 and 2 views of its flat buffers. Whoever writes them leaves the
    optimizer's float32 master copies as they were, and its next step would write those back: `weights_changed` of the
    trainer takes them over.
    """

    def __init__(
        self,
        spec: SideSpec,
        engine: Any = None,
        groups: ParallelGroups | None = None,
        weights: LocalWeights | None = None,
        trainer: AutotpTrainer | None = None,
    ) -> None:
        super().__init__(spec, engine.module if engine is not None else None, weights, trainer)
        self.engine = engine
        self.groups = groups

    def _all_columns(self, logits: torch.Tensor) -> torch.Tensor:
        """Each rank of a TP group has the columns of its part of the vocabulary."""
        metadata = metadata_of(self.engine.module.lm_head.weight)
        if metadata is None or self.groups is None:
            return logits
        sizes = metadata["partition_sizes"]
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.size(-1))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.groups.tp)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> AutotpSide:
    """Build this rank's part of the scenario's model. Collective: every rank of the job."""
    groups = build_groups(side)
    if groups is None:
        return AutotpSide(side)
    assert scenario.model is not None, "a model provider builds Megatron models only"
    assert side.dtype is not None, "flags that describe a model give its dtype"
    named = named_model(scenario.model, side.dtype)
    model = whole_model(scenario.model, named, side)
    steps = scenario.steps if scenario.trains(name) else None
    engine = build_engine(model, scenario.model, named, side, groups, device, steps)
    weights = read_weights(engine.module, named, partial(held_of, tp=groups.tp))
    trainer = AutotpTrainer(engine, groups, side, steps, device) if steps is not None else None
    return AutotpSide(side, engine, groups, weights, trainer)
