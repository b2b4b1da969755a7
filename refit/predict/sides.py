"""Predicts the sharding of a side, for any format."""

from __future__ import annotations

from refit.config.registry import FORMATS, load
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.sharding import Sharding


def predict_side(model: ModelShape, side: SideSpec) -> Sharding:
    """The boxes that every rank of `side` holds. Raises UsageError where the model cannot be sharded this way."""
    sharding: Sharding = load(FORMATS[side.format].predict)(model, side)
    return sharding


def check_side(model: ModelShape, side: SideSpec, name: str) -> None:
    """Raise UsageError where the model cannot be sharded this way. Messages call the side `name`."""
    axes = FORMATS[side.format].axes
    for axis in ("pp", "ep", "etp"):
        size = getattr(side.layout, axis)
        if axis not in axes and size > 1:
            raise UsageError(f"{name}: {side.format} sides have {', '.join(axes)} only, not {axis} {size}")
    load(FORMATS[side.format].check)(model, side, name)
