"""What the first edition's `refit report --format csv` printed, held against today's."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

RENAMED = {"name": "scenario", "num_iterations": "num_refits", "bottleneck_gb_per_s": "gb_per_s"}
"""Columns of the first edition by their names today. Columns of seconds are in ms now, those of the baseline a row."""


def check_same_figures(path: Path, printed: str) -> None:
    """That every figure of an older report at `path` is in `printed`, a CSV report of today."""
    old = list(csv.DictReader(io.StringIO(path.read_text())))
    new = list(csv.DictReader(io.StringIO(printed)))
    tested, baselines = ([row for row in new if (row["engine"] == "megatron") is which] for which in (False, True))
    assert [row["name"] for row in old] == [row["scenario"] for row in tested]
    for was, row in zip(old, tested, strict=True):
        theirs = next((each for each in baselines if each["scenario"] == row["scenario"]), dict[str, str]())
        for name, value in was.items():
            check_figure(name, value, theirs if name.startswith("megatron_") else row)


def check_figure(name: str, value: str, row: dict[str, str]) -> None:
    name = RENAMED.get(name, name).removeprefix("megatron_")
    if name.endswith("_s") and not name.endswith("_per_s"):
        shown = row.get(f"{name[:-2]}_ms", "")
        assert (float(shown) if shown else None) == (pytest.approx(1e3 * float(value)) if value else None), name
    else:
        assert row.get(name, "") == value, name
