"""Which expert is in which slot: vLLM's strategies, maps of a file, and what is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from refit.config.placement import ExpertPlacement
from refit.config.shape import Experts
from refit.errors import UsageError
from refit.predict.expert_slots import placed_layers

FILE = "map.json"


def experts(num_experts: int = 4, layers: tuple[bool, ...] = (False, True, True)) -> Experts:
    return Experts(num_experts, 1, 8, None, layers, expert_bias=False, grouped_gemm=True)


def mapped(*rows: tuple[int, ...]) -> ExpertPlacement:
    return ExpertPlacement(FILE, rows)


@pytest.mark.parametrize(
    ("strategy", "redundant", "ep", "slots"),
    [
        ("linear", None, 2, ((0, 1), (2, 3))),
        ("linear", None, 3, ((0, 1), (2,), (3,))),
        ("round_robin", None, 3, ((0, 3), (1,), (2,))),
        ("linear", 2, 3, ((0, 1), (2, 3), (0, 1))),
    ],
)
def test_strategies_place_as_vllm_does(strategy: str, redundant: int | None, ep: int, slots: Any) -> None:
    placed = placed_layers(experts(), ExpertPlacement(strategy), redundant, ep)
    assert placed == {1: slots, 2: slots}
    assert placed[1] is placed[2]


def test_rows_are_those_of_layers_with_experts_or_of_all_layers() -> None:
    first, second = (3, 2, 1, 0), (0, 2, 1, 3)
    wanted = {1: ((3, 2), (1, 0)), 2: ((0, 2), (1, 3))}
    assert placed_layers(experts(), mapped(first, second), None, 2) == wanted
    assert placed_layers(experts(), mapped((0, 1, 2, 3), first, second), None, 2) == wanted


@pytest.mark.parametrize(
    ("rows", "redundant", "ep", "message"),
    [
        ([(0, 1, 2, 3)], None, 2, "rows for 1 layers, the model has 2 with experts of 3: give 2 rows, or 3"),
        ([(0, 1, 2, 3, 0, 1)] * 2, 3, 2, "6 slots per layer for 4 experts and 3 redundant ones: .* 2, or a map of 7"),
        ([(0, 1, 2)] * 2, None, 1, "on EP size 1"),
        ([(0, 1, 2, 3, 0)] * 2, None, 2, "5 slots per layer, which EP size 2 does not divide: give 6"),
        ([(0, 1, 2, 3), (0, 1, 2, 4)], None, 2, "layer 2, slot 3: there is no expert 4, the model has 4 .0 to 3."),
        ([(0, 1, 2, -1), (0, 1, 2, 3)], None, 2, "layer 1, slot 3: there is no expert -1"),
        ([(0, 1, 2, 3), (0, 1, 2, 0)], None, 2, "layer 2: 1 of 4 experts are in no slot, the first is expert 3"),
        ([(0, 1, 2, 2, 3, 0)] * 2, None, 1, "on EP size 1"),
        ([(0, 1, 1, 2, 3, 0)] * 2, None, 2, "layer 1: expert 1 is in slots 1 and 2, both of EP rank 0"),
    ],
)
def test_other_maps_are_refused_with_the_place(rows: Any, redundant: int | None, ep: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        placed_layers(experts(), mapped(*rows), redundant, ep)


@pytest.mark.parametrize(
    ("strategy", "redundant", "ep", "message"),
    [
        ("linear", 3, 2, "4 experts . 3 redundant ones = 7 cannot be divided by EP size 2: give 4"),
        ("round_robin", 4, 2, "vLLM would place them linear"),
        ("round_robin", None, 1, "placement round_robin on EP size 1"),
        ("linear", 2, 1, "2 redundant experts on EP size 1"),
        ("linear", 8, 2, "expert 0 is in slots 0 and 4, both of EP rank 0"),
    ],
)
def test_strategies_that_vllm_has_not(strategy: str, redundant: int | None, ep: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        placed_layers(experts(), ExpertPlacement(strategy), redundant, ep)
