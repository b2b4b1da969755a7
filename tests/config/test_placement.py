"""Expert placements as flags give them: names, files as engines print them, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refit.config.placement import ExpertPlacement, read_placement
from refit.errors import UsageError

ROWS = [[0, 1, 2, 0], [3, 2, 1, 0]]


@pytest.mark.parametrize("content", [ROWS, {"physical_to_logical_map": ROWS, "metadata": {"layers": 2}}])
def test_a_map_is_read_with_and_without_its_key(tmp_path: Path, content: object) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps(content))
    assert read_placement(str(file)) == ExpertPlacement(str(file), ((0, 1, 2, 0), (3, 2, 1, 0)))


def test_strategies_are_vllms() -> None:
    assert not read_placement("round_robin").is_file
    assert read_placement("linear") == ExpertPlacement()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "holds no physical_to_logical_map"),
        ("[]", "holds no physical_to_logical_map"),
        ("[[0, 1], 7]", "row 1 must be a list of experts' numbers, not 7"),
        ("[[0, 1], [0, true]]", "row 1 must be a list"),
        ("[[0, 1], [0]]", "row 1 has 1 slots, row 0 has 2"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as refused:
        read_placement(str(file))
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_told_from_a_strategy() -> None:
    for text in ("roundrobin", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError, match=r"no strategy \(linear, round_robin\) and no file"):
            read_placement(text)
