"""What a side will hold, whichever framework holds it."""

from __future__ import annotations

from refit.config.registry import FORMATS, load
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.plan.sharding import Sharding


def predict_side(model: ModelShape, side: SideSpec) -> Sharding:
    """What every rank of `side` holds. Raises UsageError where the model cannot be sharded so."""
    sharding: Sharding = load(FORMATS[side.format].predict)(model, side)
    return sharding


def check_side(model: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where the model cannot be sharded so; `name` is the side's in the message."""
    load(FORMATS[side.format].check)(model, side, name)
