"""Predicts the sharding of a side, for any format."""

from __future__ import annotations

from refit.config.registry import FORMATS, load
from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.sharding import Sharding
from refit.predict.training_memory import TrainingMemory


def predict_side(model: ModelShape, side: SideSpec) -> Sharding:
    """The boxes that every rank of `side` holds. Raises UsageError where the model cannot be sharded this way."""
    sharding: Sharding = load(FORMATS[side.format].predict)(model, side)
    return sharding


def training_bytes(scenario: Scenario) -> dict[int, TrainingMemory]:
    """What each of the source's ranks needs beside its weights to train; empty where no training step is measured."""
    support = FORMATS[scenario.source.format].steps
    if not scenario.trains("source") or scenario.steps is None or scenario.model is None or support is None:
        return {}
    source = predict_side(scenario.model, scenario.source)
    found: dict[int, TrainingMemory] = load(support.memory)(scenario.model, scenario.source, source, scenario.steps)
    return found


def check_side(model: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where the model cannot be sharded this way. Messages call the side `name`."""
    axes = FORMATS[side.format].axes
    for axis in ("pp", "ep", "etp"):
        size = getattr(side.layout, axis)
        if axis not in axes and size > 1:
            raise UsageError(f"{name}: {side.format} sides have {', '.join(axes)} only, not {axis} {size}")
    load(FORMATS[side.format].check)(model, side, name)
