"""Plans of several stages over real ranks: every byte arrives by way of others, whoever passes on how much and when."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from random import Random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.errors import RefitError
from refit.plan.cost import bytes_matrix, cost_of, wire_only
from refit.plan.plan import RefitPlan
from refit.plan.planner import plan_refit
from refit.plan.sharding import Sharding
from refit.transport.base import TransportOptions, get_transport
from refit.transport.one_sided import shm
from refit.transport.one_sided.shm import SharedMemory
from refit.transport.ranks import Ranks
from refit.transport.two_sided.gloo import GlooBackend
from tests.plan.strategies import sides, staged
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case, fill, memory_of, own, poison, wrong_tensors
from tests.transport.test_schedule import on, tensors
from tests.transport.test_transports import BACKENDS, EXECUTORS, TIMEOUT_S, wait_for_all

pytestmark = pytest.mark.no_megatron

CASES = {
    "chain of engines": Case(Layout(2, 2, 1, 1, 2), Layout(1, 2, 1, 1, 6, first_rank=2)),
    "collocated": Case(Layout(2, 2, 1, 1, 2), Layout(2, 1, 2, 1, 8)),
    "one to all": Case(Layout(1, 1, 1, 1, 1), Layout(1, 1, 1, 1, 7, first_rank=1)),
    "padding and casts": Case(Layout(4, 2, 2, 1, 4), Layout(1, 2, 1, 1, 6, first_rank=2)),
}


@dataclass(frozen=True)
class Moved:
    """Of one rank and backend."""

    wrong: list[str]
    sent: int
    received: int
    local: int
    staging_bytes: int


def _refits(rank: int, plan: RefitPlan, backends: list[tuple[str, str]], staging_bytes: int) -> list[Moved]:
    """Three refits with each of `backends`, the weights of which nobody waits for anybody between."""
    moved = []
    for name, buffers in backends:
        source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
        options = TransportOptions(staging_bytes=staging_bytes, timeout_s=TIMEOUT_S, own=own(name, buffers))
        program = get_transport(name).prepare(plan, Ranks.of_default_group(), source, destination, options)
        wrong = []
        for iteration in range(3):
            if source is not None:
                fill(source, iteration)
            if destination is not None:
                poison(destination)
            report = program.run()
            if destination is not None:
                wrong += wrong_tensors(destination, plan, iteration)
        moved.append(
            Moved(
                wrong,
                report.wire_bytes_sent,
                report.wire_bytes_received,
                report.local_bytes,
                program.staging_bytes,
            )
        )
        torch.distributed.barrier()
        program.close()
    return moved


def _check(outcomes: list[list[Moved]], plan: RefitPlan, staging_bytes: int) -> None:
    wire, cost = wire_only(bytes_matrix(plan)), cost_of(plan)
    for by_rank in zip(*outcomes, strict=True):
        assert [moved.wrong for moved in by_rank] == [[]] * len(by_rank)
        assert sum(moved.sent for moved in by_rank) == sum(moved.received for moved in by_rank) == cost.wire_bytes
        assert sum(moved.local for moved in by_rank) == cost.local_bytes
        assert all(moved.staging_bytes <= staging_bytes for moved in by_rank)
        for rank in range(len(wire)):
            assert by_rank[rank].sent == int(wire[rank].sum()) == cost.sent_by_rank.get(rank, 0)
            assert by_rank[rank].received == int(wire[:, rank].sum())


NUMBERS = itertools.count()


def _numbered(sharding: Sharding, number: int) -> Sharding:
    """The same tensors under new keys. Ranks meet by the digest of a plan, which does not name ranks without routes."""
    return Sharding(
        sharding.ranks,
        {f"{number}.{key}": replace(spec, key=f"{number}.{key}") for key, spec in sharding.tensors.items()},
        {f"{number}.{key}": held for key, held in sharding.by_key.items()},
    )


@given(sides(most=4), st.integers(2, 3), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_random_layouts_arrive_by_way_of_random_holders(
    ranks: RankPool, pair: tuple[Sharding, Sharding], num_stages: int, random: Random
) -> None:
    number = next(NUMBERS)
    plan = staged(*(_numbered(sharding, number) for sharding in pair), num_stages, random)
    _check(ranks.run(_refits, plan, BACKENDS, 1 << 20), plan, 1 << 20)


@pytest.mark.parametrize("backend", EXECUTORS, ids="-".join)
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_layouts_of_a_model_arrive_in_stages(
    ranks: RankPool, backend: tuple[str, str], num_stages: int, name: str
) -> None:
    plan = staged(*CASES[name].plan.shardings, num_stages, Random(num_stages))
    assert {int(stage) for stage in plan.stage} == set(range(num_stages))
    _check(ranks.run(_refits, plan, [backend], 64 << 20), plan, 64 << 20)


@pytest.mark.parametrize("backend", EXECUTORS, ids="-".join)
@pytest.mark.parametrize("name", ["chain of engines", "collocated"])
def test_many_rounds_of_several_stages_interleave_in_little_staging(
    ranks: RankPool, backend: tuple[str, str], name: str
) -> None:
    case, staging_bytes = replace(CASES[name], hidden=48, ffn=96), 24 << 10
    plan = staged(*case.plan.shardings, 3, Random(1))
    outcomes = ranks.run(_refits, plan, [backend], staging_bytes)
    _check(outcomes, plan, staging_bytes)
    if backend != ("shm", "direct"):
        assert max(moved.received for (moved,) in outcomes) > 5 * staging_bytes


def chain(num_layers: int = 64) -> RefitPlan:
    """Rank 0 to 1 to 2 to 3."""
    whole = tensors(num_layers)
    ends = [on(dict.fromkeys(range(1, last + 1), whole)) for last in range(1, 4)]
    return plan_refit(on({0: whole}), ends[-1], via=ends[:-1], ranks_per_node=2)


def _hold_the_last(rank: int, backend: tuple[str, str]) -> list[str]:
    """Rank 0 sends its last message once rank 3 has its first. Without pipelining, rank 3 would wait for that one."""
    plan, store = chain(), torch.distributed.distributed_c10d._get_default_store()
    key = f"the last rank of the chain has something {backend}"
    where, send = (GlooBackend, "post") if backend[0] == "gloo" else (SharedMemory, "send")
    number = 0
    original_send, original_unpack = getattr(where, send), where.unpack
    source, destination = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    options = TransportOptions(staging_bytes=8 << 10, timeout_s=30.0, own=own(*backend))
    with mock.patch.object(shm, "DIRECT_BATCH_BYTES", 1024), mock.patch.object(shm, "SLOT_BYTES", 1024):
        program = get_transport(backend[0]).prepare(plan, Ranks.of_default_group(), source, destination, options)
    last = len(program._schedule.sends[0].messages) if rank == 0 else 0

    def held(self: object, *args: object) -> None:
        nonlocal number
        number += 1
        if rank == 0 and number == last:
            store.wait([key])
        original_send(self, *args)

    def seen(self: object, *args: object) -> None:
        original_unpack(self, *args)
        if rank == 3:
            store.set(key, "")

    if source is not None:
        fill(source, 0)
    with mock.patch.object(where, send, held), mock.patch.object(where, "unpack", seen):
        program.run()
    wrong = [] if destination is None else wrong_tensors(destination, plan, 0)
    torch.distributed.barrier()
    program.close()
    assert rank != 0 or last > 8
    return wrong


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
def test_the_last_of_a_chain_begins_before_the_first_has_ended(ranks: RankPool, backend: tuple[str, str]) -> None:
    assert ranks.run(_hold_the_last, backend) == [[]] * 8


def _without_rank_1(rank: int, backend: tuple[str, str]) -> str:
    """The error of a rank of the chain whose rank 1 never runs."""
    plan = chain(4)
    options = TransportOptions(staging_bytes=64 << 10, timeout_s=4.0, own=own(*backend))
    memories = memory_of(plan.source_sharding, rank), memory_of(plan.destination_sharding, rank)
    program = get_transport(backend[0]).prepare(plan, Ranks.of_default_group(), *memories, options)
    torch.distributed.barrier()
    message = ""
    if rank in (0, 2):
        try:
            program.run()
        except RefitError as error:
            message = str(error)
    wait_for_all(f"the end of a chain without a rank {os.getppid()} {backend}")
    return message


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[:2], ids="-".join)  # one of each executor: who waits for whom is its doing
def test_neighbours_name_a_rank_that_passes_nothing_on(ranks: RankPool, backend: tuple[str, str]) -> None:
    try:
        messages = ranks.run(_without_rank_1, backend)
    finally:
        ranks.stop()  # its connections are broken
    assert "rank 1" in messages[2]  # not rank 3, which waits for rank 2
    assert "gloo" in backend[0] or "rank 1" in messages[0]  # Gloo sends without waiting for its peer
