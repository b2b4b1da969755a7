"""A format in one file, and the plugin that registers it: the tensors of a Megatron model as plain tensors.

They are whole on every rank. What builds them is beside the other small extensions, since it needs torch.
"""

from __future__ import annotations

from refit.config.registry import FORMATS
from refit.config.rows import Format
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.plan.sharding import Sharding
from refit.predict import megatron

REFIT_INTERFACE = 1


def predict_plain(model: ModelShape, side: SideSpec) -> Sharding:
    """Every rank holds everything."""
    alone = SideSpec(type(side.layout)(1, 1, 1, 1, 1), dtype=side.dtype)
    whole = megatron.predict(model, alone)
    return Sharding.from_ranks(dict.fromkeys(side.ranks, whole.of_rank(0)))


def check_plain(model: ModelShape, side: SideSpec, name: str) -> None:
    if side.layout.tp > 1:
        raise UsageError(f"{name}: plain tensors are not split, TP is {side.layout.tp}: use 1")


PLAIN = Format(
    predict=f"{__name__}:predict_plain", check=f"{__name__}:check_plain", build="tests.seams.small_parts:build_plain"
)


def register() -> None:
    FORMATS.add("plain", PLAIN)
