"""The mark `megatron`: tests that may build a side of Megatron-Core. CI runs them with each Megatron-Core of the lock.

It goes to all tests that take ranks, but for those marked `no_megatron` or `one_megatron`, and to all of
tests/models/megatron. Sides are counted as they are built, also in the forked ranks, so that a test that is marked
`no_megatron` and builds one fails. What a test marked `one_megatron` proves is the same with every version.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refit.config.registry import FORMATS, load

FOLDER = Path(__file__).resolve().parents[1] / "models/megatron"
ROW = FORMATS["megatron"]
NUM_BUILT = multiprocessing.Value("q", 0)


def build_side(scenario: Any, name: str, spec: Any, device: Any) -> Any:
    """What the table of formats names, counted."""
    with NUM_BUILT.get_lock():
        NUM_BUILT.value += 1
    return load(ROW.build)(scenario, name, spec, device)


FORMATS._rows["megatron"] = replace(ROW, build=f"{__name__}:build_side")


def may_build(item: pytest.Item) -> bool:
    left_out = any(item.get_closest_marker(name) for name in ("no_megatron", "one_megatron"))
    takes_ranks = "ranks" in getattr(item, "fixturenames", ()) and not left_out
    return takes_ranks or item.path.is_relative_to(FOLDER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    before = NUM_BUILT.value
    outcome = yield
    if NUM_BUILT.value > before and not any(map(item.get_closest_marker, ("megatron", "one_megatron"))):
        pytest.fail("builds a side of Megatron-Core: take `no_megatron` away, or mark it `megatron`", pytrace=False)
    return outcome
