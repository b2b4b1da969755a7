"""Routing: which experts tokens choose, uniformly or as a file of measured loads says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.config import yaml_files
from refit.config.layer_rows import read_layer_rows
from refit.config.shape import Experts
from refit.errors import UsageError

KEY = "logical_count"
"""The key of SGLang's dumps of its expert distribution: tokens by layer and expert."""


@dataclass(frozen=True, slots=True)
class Routing:
    """`loads` are tokens by layer with experts and by expert, from the file `name`; empty: all are as likely."""

    name: str = "uniform"
    loads: tuple[tuple[float, ...], ...] = ()

    def probabilities(self, experts: Experts) -> list[tuple[float, ...]]:
        """For each layer with experts, how likely a token goes to each expert. Their sum is `topk`.

        Raises UsageError where the file has other layers or experts than the model, or loads that no top-k gives.
        """
        layers, count = sum(experts.layers), experts.num_experts
        if not self.loads:
            return [(experts.topk / count,) * count] * layers
        if (len(self.loads), len(self.loads[0])) != (layers, count):
            raise UsageError(
                f"--routing {self.name} has {len(self.loads)} rows of {len(self.loads[0])} loads, the model has "
                f"{layers} layers of {count} experts: give one row for each layer with experts"
            )
        return [self._scaled(number, row, experts.topk) for number, row in enumerate(self.loads)]

    def _scaled(self, number: int, row: tuple[float, ...], topk: int) -> tuple[float, ...]:
        total = sum(row)
        found = tuple(topk * load / total for load in row) if total else row
        most = max(found)
        if not total or most > 1 + 1e-6:
            share = f"{100 * most / topk:.0f} % of all choices" if total else "no load at all"
            raise UsageError(
                f"--routing {self.name}, row {number}: one expert has {share}, with top-{topk} at most "
                f"{100 / topk:.0f} %: give tokens by expert"
            )
        return tuple(min(1.0, each) for each in found)


UNIFORM = Routing()


def read_routing(text: str) -> Routing:
    """The JSON file `text`: a row of loads for each layer with experts, alone or under `logical_count`.

    Raises UsageError, with the place, for anything but rows of equally many numbers from 0 up.
    """
    file = Path(text)
    rows = read_layer_rows(file, KEY)
    return Routing(text, tuple(_row(file, number, row, rows[0]) for number, row in enumerate(rows)))


def _row(file: Path, number: int, row: Any, first: Any) -> tuple[float, ...]:
    if not isinstance(row, list) or not row or not all(_is_load(load) for load in row):
        raise UsageError(f"{file}: row {number} must be a list of loads from 0 up, not {yaml_files.shortened(row)}")
    if len(row) != len(first):
        raise UsageError(f"{file}: row {number} has {len(row)} loads, row 0 has {len(first)}: give all rows as many")
    return tuple(map(float, row))


def _is_load(load: Any) -> bool:
    return type(load) in (int, float) and 0 <= load < math.inf
