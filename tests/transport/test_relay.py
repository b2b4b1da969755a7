"""Relays over real ranks: what crosses to each node once arrives everywhere, with every transport on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.config.relay import Relay
from refit.plan import relay
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding
from tests.plan.strategies import sides
from tests.plan.test_relay import between, missing_on_nodes
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case
from tests.transport.test_stages import NUMBERS, _check, _numbered, _refits
from tests.transport.test_transports import BACKENDS

pytestmark = pytest.mark.no_megatron

STAGING_BYTES = 1 << 20
CASES = {
    "engines": (Case(Layout(2, 2, 1, 1, 2), Layout(1, 2, 1, 1, 6, first_rank=2), hidden=48), 2),
    "collocated": (Case(Layout(2, 2, 1, 1, 2), Layout(2, 1, 2, 1, 8), hidden=48), 4),
    "one to all": (Case(Layout(1, 1, 1, 1, 1), Layout(1, 1, 1, 1, 7, first_rank=1), hidden=48), 3),
}


@pytest.fixture(autouse=True)
def small_parts() -> Iterator[None]:
    with mock.patch.object(relay, "MIN_PART_BYTES", 1):
        yield


def _moved(ranks: RankPool, pair: tuple[Sharding, Sharding], name: Relay, ranks_per_node: int) -> None:
    via = relay_stages(*pair, name, ranks_per_node)
    plan = plan_refit(*pair, ranks_per_node=ranks_per_node, via=via)
    _check(ranks.run(_refits, plan, BACKENDS, STAGING_BYTES), plan, STAGING_BYTES)
    crossed = between(plan, ranks_per_node).sum(0)
    assert crossed.tolist() == missing_on_nodes(*pair, ranks_per_node).tolist()


@given(sides(most=4), st.integers(1, 4), st.sampled_from([Relay.NODE, Relay.ENGINE]))
@settings(max_examples=20)
def test_random_layouts_are_relayed(
    ranks: RankPool, pair: tuple[Sharding, Sharding], ranks_per_node: int, name: str
) -> None:
    number = next(NUMBERS)
    source, destination = (_numbered(sharding, number) for sharding in pair)
    _moved(ranks, (source, destination), name, ranks_per_node)


@pytest.mark.parametrize("name", [Relay.NODE, Relay.ENGINE])
@pytest.mark.parametrize("case", CASES)
def test_layouts_of_a_model_are_relayed(ranks: RankPool, case: str, name: Relay) -> None:
    layouts, ranks_per_node = CASES[case]
    source, *_, destination = layouts.plan.shardings
    with mock.patch.object(relay, "MIN_PART_BYTES", 256):
        via = relay_stages(source, destination, name, ranks_per_node)
    plan = plan_refit(source, destination, ranks_per_node=ranks_per_node, via=via)
    assert plan.num_stages > 1
    _check(ranks.run(_refits, plan, BACKENDS, STAGING_BYTES), plan, STAGING_BYTES)
