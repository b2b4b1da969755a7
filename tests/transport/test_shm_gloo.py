"""shm+gloo on hosts that ranks take for several: bytes go the way that they should, whatever the layouts and relays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.relay import Relay
from refit.errors import UnavailableError
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.plan.sharding import Sharding
from refit.transport.base import get_transport
from refit.transport.one_sided.shm import SharedMemory
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided import rings, shm_gloo
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


def on_hosts(rank: int, plan: RefitPlan, ranks_per_host: int, chunk_bytes: int, blocks: bool) -> tuple[Any, int, int]:
    """What `_refits` returns, and the bytes that this rank has sent through Gloo and through rings.

    `blocks`: in the order of rounds that `cuda-ipc+nccl` has.
    """
    sent = {"gloo": 0, "shm": 0}
    send, give = GlooLinks.send, rings.Rings._give

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
        patch.setattr(rings.Rings, "_give", counted_give)
        patch.setattr(shm_gloo, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(rings.MixedBackend.__init__, "__kwdefaults__", {"blocks": blocks})
        return _refits(rank, plan, WAY, STAGING_BYTES), sent["gloo"], sent["shm"]


def check(
    ranks: RankPool, plan: RefitPlan, ranks_per_host: int, chunk_bytes: int = 4096, *, blocks: bool = False
) -> None:
    answers = ranks.run(on_hosts, plan, ranks_per_host, chunk_bytes, blocks)
    _check([moved for moved, *_ in answers], plan, STAGING_BYTES)
    matrix = between(plan, ranks_per_host)
    far = NUM_REFITS * int(matrix.sum() - matrix.trace())
    # Pieces in a bucket have gaps between them.
    assert far <= sum(gloo for _, gloo, _ in answers) <= 1.2 * far + 4096 * NUM_REFITS
    assert (sum(shm for *_, shm in answers) > 0) == bool(plan.is_wire.any() and far < NUM_REFITS * _wire_bytes(plan))


def _wire_bytes(plan: RefitPlan) -> int:
    return int(plan.nbytes[plan.is_wire].sum())


@given(sides(most=4), st.integers(1, 4), st.sampled_from([Relay.OFF, Relay.NODE, Relay.ENGINE]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_layouts(
    ranks: RankPool, pair: tuple[Sharding, Sharding], ranks_per_host: int, name: Relay, blocks: bool
) -> None:
    number = next(NUMBERS)
    source, destination = (_numbered(sharding, number) for sharding in pair)
    via = relay_stages(source, destination, name, ranks_per_host)
    check(ranks, plan_refit(source, destination, ranks_per_node=ranks_per_host, via=via), ranks_per_host, blocks=blocks)


@pytest.mark.parametrize("name", [Relay.NODE, Relay.ENGINE])
@pytest.mark.parametrize("case", CASES)
def test_relays_go_both_ways_at_once(ranks: RankPool, case: str, name: Relay) -> None:
    for blocks in (False, True):
        check(ranks, relayed(case, name), CASES[case][1], chunk_bytes=1 << 10, blocks=blocks)


def test_gpus_are_what_cuda_ipc_and_nccl_need() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(
        UnavailableError, match=r"^cuda-ipc\+nccl needs CUDA GPUs, this machine has none: use .*shm\+gloo"
    ):
        get_transport("cuda-ipc+nccl").check_available()


def test_chunks_shrink_where_a_host_has_many_ranks(ranks: RankPool) -> None:
    answers = ranks.run(_ring_bytes, 1 << 20, 1 << 20)
    assert answers == [(len(answers), 1 << 20)] * len(answers)
    assert ranks.run(_ring_bytes, 1 << 20, None)[0] == (len(answers), len(answers) * rings.NUM_SLOTS << 20)


def _ring_bytes(rank: int, chunk_bytes: int, most_bytes: int | None) -> tuple[int, int]:
    """Ranks of this host that have met in rings, and the bytes of the rings of one."""
    everyone = Ranks.of_default_group()
    flags, data = (Rendezvous(everyone, f"test {what}", range(everyone.size), 60.0) for what in ("flags", "data"))
    heap = SharedMemory(data)
    made = rings.Rings(flags, heap, lambda into, part: None, chunk_bytes, 60.0, ("shm+gloo", "gloo"), most_bytes)
    found = 1 + len(made.peers), made.nbytes
    made.close()
    return found
