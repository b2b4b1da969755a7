"""Which release of transformers a prediction follows, and what that one keeps in float32.

The installed release is asked for by its number, without an import: predictions need neither transformers nor torch.
A live side is asked itself, and what it holds counts (`refit.bench.sides`).
"""

from __future__ import annotations

import functools
import re
from importlib import metadata

from refit.config.shape import Dtype, ModelShape
from refit.config.side import SideSpec
from refit.predict.families.tables import Family, Release, Row, closest_family

NEWEST: Release = (5, 24)
"""The newest release that the tables were compared with. It is followed where none is installed."""


@functools.cache
def installed() -> Release | None:
    """The release that Python would import; None where there is none."""
    try:
        return release_of(metadata.version("transformers"))
    except metadata.PackageNotFoundError:
        return None


def release_of(version: str) -> Release:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def followed() -> Release:
    return installed() or NEWEST


def kept_in_float32(family: Family, release: Release) -> tuple[Row, ...]:
    """The parameters of routed layers that this release keeps in float32 in a model of 16 bits.

    Source: `_keep_in_fp32_modules_strict` of transformers' model classes.
    """
    return tuple(row for row in family.routed if row.float32_since is not None and row.float32_since <= release)


def fsdp2_note(shape: ModelShape, side: SideSpec) -> str | None:
    """What a prediction of an FSDP2 side takes from transformers; None where every parameter has the side's dtype."""
    kept = _kept_text(shape, side)
    if kept is None:
        return None
    if installed() is None:
        return f"transformers is not installed here: {kept} is taken as float32, as {_text(NEWEST)} keeps it"
    return f"transformers {_text(followed())} keeps {kept} in float32, in a module of its own for fully_shard"


def autotp_note(shape: ModelShape, side: SideSpec) -> str | None:
    """What DeepSpeed makes of the parameters that transformers keeps in float32; None where there are none."""
    kept = _kept_text(shape, side)
    if kept is None or side.dtype is None:
        return None
    return f"DeepSpeed casts {kept} to {side.dtype.value}, transformers {_text(followed())} keeps it in float32"


def _kept_text(shape: ModelShape, side: SideSpec) -> str | None:
    rows = kept_in_float32(closest_family(shape), followed())
    if side.dtype is Dtype.FP32 or shape.experts is None or not rows:
        return None
    return " and ".join(row.name for row in rows)


def _text(release: Release) -> str:
    return ".".join(map(str, release))
