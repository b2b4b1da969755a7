"""NIXL between hosts that are network namespaces: over TCP, as planned, and with links and hosts that fail."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from refit.config.relay import Relay
from refit.plan.planner import plan_refit
from refit.plan.relay import relay_stages
from refit.transport.base import TransportOptions, get_transport
from refit.transport.ranks import Ranks
from tests.hosts.network import INTERFACE
from tests.hosts.test_hosts import EP4, QWEN, VLLM, Hosts, crossed_bytes, hosts, in_a_while, refit, sharded
from tests.ranks.pool import RankError
from tests.transport.synthetic import memory_of
from tests.transport.test_nixl import installed

pytestmark = [installed, pytest.mark.slow]
NIXL = [*(flag.replace("gloo", "nixl") for flag in QWEN), *EP4, *VLLM, "--rl-inference-data-parallel-size=4"]


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Hosts]:
    yield from hosts(2, 4)


@pytest.fixture
def three_hosts() -> Iterator[Hosts]:
    yield from hosts(3, 2, mbit=200)


@pytest.mark.megatron
@pytest.mark.parametrize("flags", [[], ["--rl-inference-dtype=fp8-block"]], ids=["bf16", "fp8"])
def test_what_crosses_is_what_is_planned(two_hosts: Hosts, flags: list[str]) -> None:
    direct, least = crossed_bytes(refit(two_hosts, [*NIXL, *flags]))
    assert direct > 2 * least
    result = refit(two_hosts, [*NIXL, *flags, "--refit-relay=node"])
    assert crossed_bytes(result) == (least, least)
    connected = result.engines["refit"].connected
    assert connected is not None
    assert connected.endswith(f"tcp/{INTERFACE} between hosts")


def _until_it_fails(rank: int, timeout_s: float) -> None:
    """Refits of rank 0's weights to all others, relayed between hosts of two ranks."""
    ranks = Ranks.of_default_group()
    sides = sharded(ranks.size, 512)
    plan = plan_refit(*sides, ranks_per_node=2, via=relay_stages(*sides, Relay.NODE, 2))
    source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    options = TransportOptions(staging_bytes=4 << 20, timeout_s=timeout_s)
    program = get_transport("nixl").prepare(plan, ranks, source, destination, options)
    while True:
        program.run()


@pytest.mark.parametrize("how", ["link", "host"])
def test_a_link_that_stays_down_and_a_host_that_is_lost_are_named_within_the_timeout(
    three_hosts: Hosts, how: str
) -> None:
    pool, network = three_hosts.ranks, three_hosts.network
    fail = {
        "link": lambda: network.set_link(2, up=False),
        "host": lambda: [pool.kill(rank) for rank in (4, 5)],
    }[how]
    thread = in_a_while(4.0, fail)
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(_until_it_fails, 6.0)
    thread.join()
    assert time.monotonic() - begin < 4.0 + 6.0 + 30.0
    named = set(re.findall(r"RefitError: rank (\d)", str(caught.value)))
    named |= set(re.findall(r"from rank (\d)", str(caught.value)))
    assert named & {"4", "5"}, str(caught.value)
