"""shm+gloo on hosts that ranks take for several: bytes go the way that they should, whatever the layouts and relays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.relay import Relay
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding
from refit.transport.two_sided import shm_gloo
from refit.transport.two_sided.gloo import GlooLinks
from tests.plan.strategies import sides
from tests.plan.test_relay import between
from tests.ranks.hosts import hosts_of
from tests.ranks.pool import RankPool
from tests.transport.test_onward import relayed
from tests.transport.test_relay import CASES
from tests.transport.test_stages import NUMBERS, _check, _numbered, _refits

pytestmark = pytest.mark.no_megatron

WAY = [("shm+gloo", "ring")]
STAGING_BYTES = 1 << 20
NUM_REFITS = 3


def on_hosts(rank: int, plan: RefitPlan, ranks_per_host: int, chunk_bytes: int) -> tuple[Any, int, int]:
    """What `_refits` returns, and the bytes that this rank has sent through Gloo and through rings."""
    sent = {"gloo": 0, "shm": 0}
    send, give = GlooLinks.send, shm_gloo.Rings._give

    def counted_send(self: Any, buffer: Any, peer: int) -> Any:
        sent["gloo"] += buffer.numel()
        return send(self, buffer, peer)

    def counted_give(self: Any, queue: Any) -> bool:
        before = queue[0].position
        moving, moved = queue[0], give(self, queue)
        sent["shm"] += moving.position - before
        return moved

    with (
        hosts_of(rank, ranks_per_host),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(GlooLinks, "send", counted_send)
        patch.setattr(shm_gloo.Rings, "_give", counted_give)
        patch.setattr(shm_gloo, "CHUNK_BYTES", chunk_bytes)
        return _refits(rank, plan, WAY, STAGING_BYTES), sent["gloo"], sent["shm"]


def check(ranks: RankPool, plan: RefitPlan, ranks_per_host: int, chunk_bytes: int = 4096) -> None:
    answers = ranks.run(on_hosts, plan, ranks_per_host, chunk_bytes)
    _check([moved for moved, *_ in answers], plan, STAGING_BYTES)
    matrix = between(plan, ranks_per_host)
    far = NUM_REFITS * int(matrix.sum() - matrix.trace())
    # Pieces in a bucket have gaps between them.
    assert far <= sum(gloo for _, gloo, _ in answers) <= 1.2 * far + 4096 * NUM_REFITS
    assert (sum(shm for *_, shm in answers) > 0) == bool(plan.is_wire.any() and far < NUM_REFITS * _wire_bytes(plan))


def _wire_bytes(plan: RefitPlan) -> int:
    return int(plan.nbytes[plan.is_wire].sum())


@given(sides(most=4), st.integers(1, 4), st.sampled_from([Relay.OFF, Relay.NODE, Relay.ENGINE]))
@settings(max_examples=15, deadline=None)
def test_random_layouts(ranks: RankPool, pair: tuple[Sharding, Sharding], ranks_per_host: int, name: Relay) -> None:
    number = next(NUMBERS)
    source, destination = (_numbered(sharding, number) for sharding in pair)
    via = relay_stages(source, destination, name, ranks_per_host)
    check(ranks, plan_refit(source, destination, ranks_per_node=ranks_per_host, via=via), ranks_per_host)


@pytest.mark.parametrize("name", [Relay.NODE, Relay.ENGINE])
@pytest.mark.parametrize("case", CASES)
def test_relays_go_both_ways_at_once(ranks: RankPool, case: str, name: Relay) -> None:
    check(ranks, relayed(case, name), CASES[case][1], chunk_bytes=1 << 10)
