"""Codes, scales and weights that arrive unquantised are passed on as they are: nothing is quantised again for it."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import pytest

from refit.config.quantisation import Place, Quantisation
from refit.config.relay import Relay
from refit.plan import relay
from refit.plan.cost import cost_of
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.predict.sides import PlannedSides
from tests.encodings.fp8 import test_program
from tests.plan.strategies import staged
from tests.ranks.pool import RankPool
from tests.transport.test_transports import EXECUTORS

pytestmark = pytest.mark.no_megatron


def _refits_in_stages(
    rank: int, seed: int, way: tuple[str, str], quantisation: Quantisation, name: Relay = Relay.OFF
) -> Any:
    """What `refit_twice` finds with a plan of two stages, or with a relay, and whether that passes anything on."""
    original, passed_on = test_program.plan_sides, []

    def in_stages(*args: Any) -> PlannedSides:
        planned = original(*args)
        plan = (
            _relayed(planned.plan, name) if name is not Relay.OFF else staged(*planned.plan.shardings, 2, Random(seed))
        )
        passed_on.append(bool((plan.stage > 0).any()))
        return replace(planned, plan=plan, cost=cost_of(plan))

    with mock.patch.object(test_program, "plan_sides", in_stages):
        wrong, num_blocks = test_program.refit_twice(rank, seed, way, quantisation)
    return wrong, num_blocks, passed_on


def _relayed(plan: RefitPlan, name: Relay) -> RefitPlan:
    """As between nodes of two ranks. A part may be one row: blocks are cut, and their codes come by several ways."""
    sides = plan.shardings[0], plan.shardings[-1]
    with mock.patch.object(relay, "MIN_PART_BYTES", 1), mock.patch.object(relay, "ROWS", 1):
        return plan_refit(*sides, ranks_per_node=2, via=relay_stages(*sides, name, 2))


@pytest.mark.slow
@pytest.mark.parametrize("way", EXECUTORS, ids="-".join)
def test_quantised_weights_arrive_by_way_of_others(ranks: RankPool, way: tuple[str, str]) -> None:
    relayed = 0
    for seed in range(4):
        place = Place.DESTINATION if seed == 3 else Place.AUTO
        answers = ranks.run(_refits_in_stages, seed, way, Quantisation("fp8-block", "pow2", place=place))
        assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS, seed
        relayed += all(passed_on == [True] for _, _, passed_on in answers)
    assert relayed > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [Relay.NODE, Relay.ENGINE])
@pytest.mark.parametrize("way", EXECUTORS, ids="-".join)
def test_quantised_weights_are_relayed(ranks: RankPool, way: tuple[str, str], name: Relay) -> None:
    relayed = 0
    for seed in range(4):
        place = Place.DESTINATION if seed == 3 else Place.AUTO
        answers = ranks.run(_refits_in_stages, seed, way, Quantisation("fp8-block", "pow2", place=place), name)
        assert [wrong for wrong, _, _ in answers] == [{}] * test_program.RANKS, seed
        relayed += all(passed_on == [True] for _, _, passed_on in answers)
    assert relayed > 1
