"""ExpertPlacement: where an engine's flags say that its routed experts live, and the maps that engines print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.config.layer_rows import read_layer_rows
from refit.errors import UsageError

KEY = "physical_to_logical_map"
"""The map's key in the files of SGLang (`--init-expert-location`) and in vLLM's load-balancer state."""

STRATEGIES = ("linear", "round_robin")
"""vLLM's `--expert-placement-strategy`."""


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """A strategy of `STRATEGIES`, or the file `name` and its `rows`: the expert in every slot, one row per layer."""

    name: str = "linear"
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def is_file(self) -> bool:
        return bool(self.rows)


def read_placement(text: str) -> ExpertPlacement:
    """A strategy's name, or the map in the JSON file `text`: `{"physical_to_logical_map": [[0, 1, ...], ...]}`.

    The list alone is read too. Raises UsageError, with the place, for anything but rows of equally many whole numbers.
    """
    if text in STRATEGIES:
        return ExpertPlacement(text)
    file = Path(text)
    if not _is_there(file):
        raise UsageError(f"{text} is no strategy ({', '.join(STRATEGIES)}) and no file: give one of them")
    rows = read_layer_rows(file, KEY)
    return ExpertPlacement(text, tuple(_row(file, number, row, rows[0]) for number, row in enumerate(rows)))


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name too long, a null character
        return False


def _row(file: Path, number: int, row: Any, first: Any) -> tuple[int, ...]:
    if not isinstance(row, list) or not row or any(type(expert) is not int for expert in row):
        raise UsageError(f"{file}: row {number} must be a list of experts' numbers, not {yaml_files.shortened(row)}")
    if len(row) != len(first):
        raise UsageError(f"{file}: row {number} has {len(row)} slots, row 0 has {len(first)}: give all rows as many")
    return tuple(row)
