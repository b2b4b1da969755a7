"""Codes, scales and weights that arrive unquantised are passed on as they are: nothing is quantised again for it."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import pytest

from refit.config.quantisation import Place, Quantisation
from refit.plan.cost import cost_of
from refit.predict.sides import PlannedSides
from tests.encodings.fp8 import test_program
from tests.plan.strategies import staged
from tests.ranks.pool import RankPool


def _refits_in_stages(rank: int, seed: int, way: tuple[str, str], quantisation: Quantisation) -> Any:
    """What `refit_twice` finds with a plan of two stages, and whether that passes anything on."""
    original, passed_on = test_program.plan_sides, []

    def in_stages(*args: Any) -> PlannedSides:
        planned = original(*args)
        plan = staged(*planned.plan.shardings, 2, Random(seed))
        passed_on.append(bool((plan.stage > 0).any()))
        return replace(planned, plan=plan, cost=cost_of(plan))

    with mock.patch.object(test_program, "plan_sides", in_stages):
        wrong, num_blocks = test_program.refit_twice(rank, seed, way, quantisation)
    return wrong, num_blocks, passed_on


@pytest.mark.slow
@pytest.mark.parametrize("way", test_program.WAYS, ids="-".join)
def test_quantised_weights_arrive_by_way_of_others(ranks: RankPool, way: tuple[str, str]) -> None:
    relayed = 0
    for seed in range(4):
        place = Place.DESTINATION if seed == 3 else Place.AUTO
        answers = ranks.run(_refits_in_stages, seed, way, Quantisation("fp8-block", "pow2", place=place))
        assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS, seed
        relayed += all(passed_on == [True] for _, _, passed_on in answers)
    assert relayed > 1
