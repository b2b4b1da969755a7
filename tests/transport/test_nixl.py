"""NIXL beside what all methods are tested for: runs, slots, notifications, what carries the bytes, and what fails."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refit.config.layout import Layout
from refit.copies.copy import Copy
from refit.errors import RefitError, UnavailableError
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.transport.base import Connected, TransportOptions, get_transport
from refit.transport.messages import Channel, Message, Piece
from refit.transport.one_sided.nixl import library
from refit.transport.one_sided.nixl.memory import NixlMemory
from refit.transport.one_sided.nixl.options import NixlOptions
from refit.transport.one_sided.nixl.runs import ADDRESSES, TOGETHER_BYTES, put_together, run_bytes, runs_of
from refit.transport.one_sided.nixl.ucx_log import ways_in
from refit.transport.one_sided.nixl.ways import NEAR, why_slow
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.ranks import Ranks
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case, fill, poison, wrong_tensors
from tests.transport.test_transports import CASES, wait_for_all

pytestmark = pytest.mark.no_megatron
installed = pytest.mark.skipif(not any(find_spec(name) for name in library.MODULES), reason="nixl is not installed")
CASE = CASES["tp up, etp down"]
MIXED = replace(CASE, hidden=256, ffn=2048)
"""Has experts in runs of 2 KiB beside others that are whole."""

SHORT_S = 4.0


@st.composite
def strided_pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of equal shape in memory of their own, with gaps behind rows of any dim."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    gaps = [[draw(st.integers(0, 1)) for _ in shape] for _ in range(2)]
    wholes = [torch.arange(int(np.prod(np.add(shape, gap)))).view(*np.add(shape, gap).tolist()) for gap in gaps]
    source, destination = (whole.to(torch.int16)[tuple(slice(n) for n in shape)] for whole in wholes)
    return source, torch.full_like(destination, -1)


@given(strided_pairs(), st.integers(0, 3))
def test_runs_carry_every_byte_of_a_copy_and_no_other(pair: tuple[torch.Tensor, torch.Tensor], extra: int) -> None:
    source, destination = pair
    whole = torch.full((destination.numel() * 4 + 64,), -7, dtype=torch.int16)
    strides = [stride * (extra + 1) for stride in destination.stride()]
    last = sum((size - 1) * stride for size, stride in zip(destination.shape, strides, strict=True))
    if last >= whole.numel():
        return
    theirs = torch.as_strided(whole, destination.shape, strides)
    there = torch.empty(ADDRESSES // 2, dtype=torch.int16, device="meta")
    stated = torch.as_strided(there, destination.shape, strides, whole.data_ptr() // 2)
    rows = runs_of(Copy(stated, source))
    assert {int(nbytes) for nbytes in rows[:, 2]} == {run_bytes(Copy(stated, source))}
    for own, address, nbytes in rows.tolist():
        ctypes.memmove(address, own, nbytes)
    expected = torch.full_like(whole, -7)
    torch.as_strided(expected, destination.shape, strides).copy_(source)
    assert torch.equal(whole, expected)
    assert torch.equal(theirs, source)


def test_casts_have_no_runs() -> None:
    assert run_bytes(Copy(torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=torch.bfloat16))) is None


def _message(megabytes: int, stage: int = 0) -> Message:
    spec = TensorSpec("weight", (megabytes << 19,), "bfloat16")
    return Message((Piece(spec, Box.whole(spec.shape), 0),), megabytes << 20, stage=stage)


def test_neighbours_in_place_become_one_message_within_the_limit_and_the_first_stage() -> None:
    sizes = [8, 8, 8, 8, 8, 1, 8, 8]
    channel = Channel(0, 1, (*map(_message, sizes), _message(8, stage=1), _message(8, stage=1)))
    joined, staged = put_together(channel, [5])
    most = TOGETHER_BYTES >> 20
    assert most == 32
    assert [message.nbytes >> 20 for message in joined.messages] == [32, 8, 1, 16, 8, 8]
    assert staged == [2]
    assert [piece for each in joined.messages for piece in each.pieces] == [
        piece for each in channel.messages for piece in each.pieces
    ]


TABLES = """
[1.5] [vm:1:0]   | one self cfg#0                                                        |
[1.5] [vm:1:0]   | remote memory write by ucp_put*(multi) from host memory to host       |
[1.5] [vm:1:0]   | 0..inf | zero-copy   | xpmem/memory                                  |
[1.5] [vm:1:0]   | one intra-node cfg#1                                                  |
[1.5] [vm:1:0]   | active message by ucp_am_send*(egr) from host memory                  |
[1.5] [vm:1:0]   | 0..inf | short       | sysv/memory                                   |
[1.5] [vm:1:0]   | one inter-node cfg#2                                                  |
[1.5] [vm:1:0]   | remote memory write by ucp_put*(multi) from host memory to host       |
[1.5] [vm:1:0]   |     0..8184 | short              | tcp/lo                             |
[1.5] [vm:1:0]   |   8185..inf | zero-copy          | rc_mlx5/mlx5_0:1                   |
"""


def test_what_ucx_has_chosen_for_large_writes_to_peers_is_read_from_its_tables() -> None:
    assert ways_in(TABLES) == "rc_mlx5/mlx5_0:1"
    assert ways_in(TABLES.replace("inter-node", "self")) is None
    assert ways_in("nothing of the kind") is None


def _options(timeout_s: float = 60.0) -> TransportOptions:
    return TransportOptions(staging_bytes=1 << 20, timeout_s=timeout_s)


def _prepared(rank: int, case: Case, timeout_s: float = 60.0) -> Any:
    memories = case.memory(case.source, rank), case.memory(case.destination, rank)
    ranks = Ranks.of_default_group()
    return *memories, get_transport("nixl").prepare(case.plan, ranks, *memories, _options(timeout_s))


def _refit_with_every_notification_twice(rank: int) -> tuple[list[str], tuple[int, int], int]:
    """Wrong tensors, how many messages go through slots and how many are sent, and registrations that are left."""
    notify, send = library.Agent.notify, NixlMemory.send
    register, deregister = library.Agent.register, library.Agent.deregister
    held: list[library.Registration] = []
    wrong: list[str] = []

    def noted(agent: library.Agent, memories: Any) -> library.Registration:
        held.append(register(agent, memories))
        return held[-1]

    def released(agent: library.Agent, registration: library.Registration) -> None:
        held.remove(registration)
        deregister(agent, registration)

    def notify_twice(agent: library.Agent, name: str, note: bytes) -> None:
        notify(agent, name, note)
        notify(agent, name, note)

    def send_twice(memory: NixlMemory, peer: int, put: Put, value: int) -> None:
        send(memory, peer, put, value)
        while memory._under_way:
            memory._progress()
        notify(memory._agent, memory._peers[peer].name, memory._note(peer, Counter.ARRIVED, value))

    with (
        mock.patch.object(library.Agent, "notify", notify_twice),
        mock.patch.object(NixlMemory, "send", send_twice),
        mock.patch.object(library.Agent, "register", noted),
        mock.patch.object(library.Agent, "deregister", released),
    ):
        source, destination, program = _prepared(rank, MIXED)
        for iteration in range(3):
            if source is not None:
                fill(source, iteration)
            if destination is not None:
                poison(destination)
            torch.distributed.barrier()
            program.run()
            torch.distributed.barrier()
            wrong += [] if destination is None else wrong_tensors(destination, MIXED.plan, iteration)
            for shard in destination or ():  # which is then registered anew, and offered
                shard.owner.data = shard.owner.data.clone()
        assert held
        buffers = program._buffers
        num_staged = sum(len(target.staged) for target in buffers._targets.values())
        num_sent = sum(len(channel.messages) for channel in buffers.schedule.sends)
        program.close()
    return wrong, (num_staged, num_sent), len(held)


def test_gpu_memory_that_goes_by_the_host_is_slow_and_the_reason_is_named() -> None:
    assert why_slow(NEAR, "cma/memory, tcp/lo, cuda_ipc/cuda", "cuda") is None
    assert "expandable segments" in str(why_slow(NEAR, "cma/memory, tcp/lo", "cuda"))


@installed
def test_notifications_that_come_twice_change_nothing_and_nothing_stays_registered(ranks: RankPool) -> None:
    answers = ranks.run(_refit_with_every_notification_twice)
    assert [wrong for wrong, *_ in answers] == [[]] * 8
    for rank in MIXED.source.ranks:
        num_staged, num_sent = answers[rank][1]
        assert 0 < num_staged < num_sent, "short runs go through slots, others in place"
    assert [left for *_, left in answers] == [0] * 8


def _connect(rank: int) -> Connected | None:
    return get_transport("nixl").connect(CASE.plan, Ranks.of_default_group(), _options())


@installed
def test_what_carries_the_bytes_is_stated_and_a_slow_way_is_named() -> None:
    for tls, way in (("", "cma/memory"), ("tcp,self", "tcp/")):
        pool = RankPool(8, lambda rank, tls=tls: os.environ.update({"UCX_TLS": tls} if tls else {}))
        try:
            found = pool.run(_connect)[0]
        finally:
            pool.stop()
        assert found.words.startswith("UCX: ")
        assert way in found.words
        assert found.words.endswith("within a host")
        if tls:
            assert "GB/s from rank" in found.slow
            assert "UCX_TLS leaves cma out" in found.slow
        else:
            assert found.slow is None


def _run_beside_one_that_fails(rank: int, failing: int, how: str) -> tuple[str, float]:
    """The error of a rank, and after how long. Rank `failing` dies, or is stopped, once all are prepared."""
    *_, program = _prepared(rank, MIXED, SHORT_S)
    torch.distributed.barrier()
    if rank == failing:
        if how == "dies":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    start, message = time.monotonic(), ""
    try:
        program.run()
    except RefitError as error:
        message = str(error)
    seconds = time.monotonic() - start
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"error of {rank}", f"{seconds:.3f} {message}")
    wait_for_all("the end of a refit beside one that fails", 7)
    return message, seconds


@installed
@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("failing", [1, 5])
def test_a_rank_that_dies_or_stops_is_named_within_the_timeout(how: str, failing: int) -> None:
    case = replace(MIXED, source=Layout(2, 2, 2, 1, 4), destination=Layout(4, 4, 1, 1, 4, first_rank=4))
    assert case == MIXED
    pool = RankPool(8)
    pool._start()
    try:
        for pipe in pool._pipes:
            pipe.send((_run_beside_one_that_fails, (failing, how)))
        answers = {}
        for rank, pipe in enumerate(pool._pipes):
            if rank != failing:
                assert pipe.poll(60), f"rank {rank} hangs"
                ok, answers[rank] = pipe.recv()
                assert ok, answers[rank]
    finally:
        pool.stop()
    named = [rank for rank, (message, _) in answers.items() if f"rank {failing}" in message]
    assert named, answers
    assert all(seconds < 4 * SHORT_S + 20 for _, seconds in answers.values())


def _why_unavailable(rank: int, backend: str) -> str:
    try:
        get_transport("nixl").check_available(TransportOptions(own=NixlOptions(backend)))
    except UnavailableError as error:
        return str(error)
    return ""


@installed
@pytest.mark.parametrize(
    ("backend", "match"),
    [
        ("UCX", "$"),
        ("NOPE", "NIXL has no backend NOPE here: use --nixl-backend UCX, or another one of .*UCX"),
        ("GDS", "NIXL cannot start its backend GDS"),
        ("POSIX", "NIXL's backend POSIX moves memory to files, not to other ranks"),
    ],
)
def test_a_backend_that_is_missing_or_reaches_no_peer_is_waived(ranks: RankPool, backend: str, match: str) -> None:
    """On ranks: processes that are forked from one that has used NIXL cannot use it."""
    for message in ranks.run(_why_unavailable, backend):
        assert re.match(match, message), message
        assert "\n" not in message


def test_a_process_that_was_forked_from_one_with_an_agent_is_refused() -> None:
    with (
        mock.patch.object(library, "_AGENTS", {(os.getppid(), "UCX"): mock.Mock()}),
        pytest.raises(UnavailableError, match="in use before this process was forked"),
    ):
        library.agent("UCX")


def test_without_the_library_it_says_how_to_get_it() -> None:
    with (
        mock.patch.object(library, "MODULES", ("no_such_module",)),
        mock.patch.object(library, "_AGENTS", {}),
        pytest.raises(UnavailableError, match=r"nixl is not installed: pip install 'refit-benchmark\[nixl\]'"),
    ):
        get_transport("nixl").check_available()


def _register_nothing(rank: int) -> str:
    """The error of memory that this process does not have."""
    agent = library.agent("UCX")
    memory = mock.Mock(numel=lambda: 1 << 20, data_ptr=lambda: 0, is_cuda=False)
    try:
        agent.register([memory])
    except RefitError as error:
        return str(error)
    return ""


@installed
def test_memory_that_cannot_be_registered_is_refused_in_one_line(ranks: RankPool) -> None:
    (message, *_) = ranks.run(_register_nothing)
    assert "UCX cannot register 1.0 MiB of DRAM (NIXL_ERR_BACKEND)" in message
    assert "\n" not in message


def _prepare_where_one_cannot(rank: int) -> tuple[str, list[str]]:
    """The error of preparing where rank 5 cannot register, and wrong tensors of a refit that is prepared after it."""
    register = library.Agent.register

    def refused(agent: library.Agent, memories: Any) -> library.Registration:
        if rank == 5:
            raise RefitError("rank 5 has no memory to register")
        return register(agent, memories)

    message = ""
    with mock.patch.object(library.Agent, "register", refused):
        try:
            _prepared(rank, CASE)
        except RefitError as error:
            message = str(error)
    source, destination, program = _prepared(rank, CASE)
    if source is not None:
        fill(source, 1)
    torch.distributed.barrier()
    program.run()
    program.close()
    return message, [] if destination is None else wrong_tensors(destination, CASE.plan, 1)


@installed
def test_a_rank_that_cannot_register_ends_the_preparation_of_all(ranks: RankPool) -> None:
    assert ranks.run(_prepare_where_one_cannot) == [("rank 5 has no memory to register", [])] * 8
