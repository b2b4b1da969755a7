"""Measured routing: what a file of loads says, and what it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refit.config.routing import UNIFORM, read_routing
from refit.config.shape import Experts
from refit.errors import UsageError

EXPERTS = Experts(4, 2, 8, None, (False, True, True), False, True)


def written(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_uniform_routing_is_top_k_over_experts() -> None:
    assert UNIFORM.probabilities(EXPERTS) == [(0.5,) * 4] * 2


def test_loads_become_probabilities(tmp_path: Path) -> None:
    loads = [[4, 2, 1, 1], [1, 1, 1, 1]]
    for content in (loads, {"logical_count": loads}):
        found = read_routing(written(tmp_path / "loads.json", content)).probabilities(EXPERTS)
        assert found == [(1.0, 0.5, 0.25, 0.25), (0.5,) * 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1, 1, 1, 1]], "has 1 rows of 4 loads, the model has 2 layers of 4 experts"),
        ([[9, 1, 1, 1], [1, 1, 1, 1]], r"row 0: one expert has 75 % of all choices, with top-2 at most 50 %"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "row 0: one expert has no load at all"),
    ],
)
def test_loads_of_another_model_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_routing(written(tmp_path / "loads.json", content)).probabilities(EXPERTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no logical_count"),
        ([], "holds no logical_count"),
        ([[1, -1]], "row 0 must be a list of loads from 0 up"),
        ([[1], [1, 2]], "row 1 has 2 loads, row 0 has 1"),
        ([[True]], "row 0 must be a list of loads"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_routing(written(tmp_path / "loads.json", content))
