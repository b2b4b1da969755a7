"""Settings of formats and methods in files: plain values, of the class that the row of the format or method names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from refit.config.options import UndecodedOptions
from refit.config.registry import FORMATS, METHODS, load
from refit.config.scenario import Scenario
from refit.config.side import SideSpec

Convert = Callable[[object, type], Any]


def with_typed_options(scenario: Scenario, convert: Convert) -> Scenario:
    """`scenario` with the settings of its sides and methods as their classes; `convert(values, class)` makes them.

    Those of a plugin that is not loaded stay as they are. Raises ValueError, naming the place, for malformed ones.
    """
    return replace(
        scenario,
        source=typed_side(scenario.source, "source", convert),
        destination=typed_side(scenario.destination, "destination", convert),
        method_options={
            name: _typed(options, METHODS[name].options if name in METHODS else None, f"method_options.{name}", convert)
            for name, options in scenario.method_options.items()
        },
    )


def typed_side(side: SideSpec, name: str, convert: Convert) -> SideSpec:
    """The same for one side; `name` is its place in messages."""
    kind = FORMATS[side.format].options if side.format in FORMATS else None
    return replace(side, options=_typed(side.options, kind, f"{name}.options", convert))


def _typed(options: Any, kind: str | None, place: str, convert: Convert) -> Any:
    if kind is None or not isinstance(options, UndecodedOptions):
        return options
    try:
        return convert(options.values, load(kind))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
