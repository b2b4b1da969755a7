"""Both executors over real ranks: every byte arrives within the bound on staging, and errors name the peer."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from refit.config.layout import Layout
from refit.errors import RefitError, UnavailableError, UsageError
from refit.memory import phases
from refit.transport.base import TransportOptions, get_transport
from refit.transport.one_sided import shm
from refit.transport.one_sided.nixl import library
from refit.transport.ranks import Ranks
from refit.transport.two_sided import gloo
from tests.ranks.pool import PATIENCE_S, RankError, RankPool
from tests.transport.synthetic import Case, fill, own, poison, wrong_tensors

pytestmark = pytest.mark.no_megatron

TIMEOUT_S = 100.0

BACKENDS = [("gloo", "ring"), ("shm", "ring"), ("shm", "direct"), ("shm+gloo", "ring")]
if any(find_spec(name) is not None for name in library.MODULES):
    BACKENDS.append(("nixl", "ring"))  # elsewhere tests/transport/test_nixl.py says that it is left out
EXECUTORS = BACKENDS[:3]
"""Both executors, with and without staging: for tests of what does not depend on what moves the bytes."""

CASES = {
    "experts gathered": Case(Layout(2, 2, 2, 1, 4), Layout(2, 1, 2, 1, 2, first_rank=4)),
    "tp up, etp down": Case(Layout(2, 2, 2, 1, 4), Layout(4, 4, 1, 1, 4, first_rank=4)),
    "2 to 3": Case(Layout(2, 2, 1, 1, 2), Layout(3, 1, 3, 1, 3, first_rank=2), cast=False),
    "collocated": Case(Layout(2, 2, 4, 1, 8), Layout(4, 8, 1, 1, 8)),
    "identity": Case(Layout(2, 4, 1, 1, 4), Layout(2, 4, 1, 1, 4)),
    "one to all": Case(Layout(1, 1, 1, 1, 1), Layout(1, 1, 1, 1, 7, first_rank=1)),
    "overlapping windows": Case(Layout(4, 2, 2, 1, 4), Layout(2, 4, 1, 1, 4, first_rank=2)),
}


@dataclass(frozen=True)
class Outcome:
    wrong: list[str]
    sent: int
    received: int
    local: int
    staging_bytes: int
    covered: float


def _refit(rank: int, case: Case, backend: tuple[str, str], staging_bytes: int, move: bool = False) -> Outcome:
    """Three refits, timed by this thread's own CPU time. With `move`, every weight gets new storage in between."""
    plan = case.plan
    source, destination = case.memory(case.source, rank), case.memory(case.destination, rank)
    options = TransportOptions(staging_bytes=staging_bytes, timeout_s=TIMEOUT_S, own=own(*backend))
    program = get_transport(backend[0]).prepare(plan, Ranks.of_default_group(), source, destination, options)
    wrong = []
    for iteration in range(3):
        torch.distributed.barrier()
        if source is not None:
            fill(source, iteration)
        if destination is not None:
            poison(destination)
        torch.distributed.barrier()
        with mock.patch.object(phases.time, "perf_counter", time.thread_time):
            start = time.thread_time()
            report = program.run()
            elapsed = time.thread_time() - start
        if destination is not None:
            wrong += wrong_tensors(destination, plan, iteration)
        if move:
            _give_new_storage(source, destination)
    staging = program.staging_bytes
    program.close()
    if destination is not None:
        wrong += wrong_tensors(destination, plan, 2)
    in_phases = sum(report.phases_s.values())
    assert in_phases <= elapsed
    return Outcome(
        wrong, report.wire_bytes_sent, report.wire_bytes_received, report.local_bytes, staging, in_phases / elapsed
    )


class _NoStreams:
    """Replaces the CUDA streams where there is no GPU: calls return when their work is done."""

    def __init__(self, device: torch.device) -> None:
        self.pack = self.unpack = self.local = self

    def begin(self) -> None: ...
    def synchronize(self) -> None: ...
    def finish(self) -> None: ...
    def record_event(self) -> _NoStreams:
        return self


@contextmanager
def through_pinned_memory() -> Iterator[None]:
    """The backend for GPU weights over Gloo, on a machine that has neither CUDA streams nor pinned memory."""
    pageable, pinned = torch.empty, gloo.PinnedGlooBackend

    def empty(*sizes: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return pageable(*sizes, **options)

    with (
        mock.patch.object(gloo, "Streams", _NoStreams),
        mock.patch.object(torch.cuda, "stream", nullcontext),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(gloo, "GlooBackend", partial(pinned, device=torch.device("cpu"))),
    ):
        yield


def _refit_through_pinned_memory(rank: int, case: Case, staging_bytes: int) -> Outcome:
    with through_pinned_memory():
        return _refit(rank, case, ("gloo", "ring"), staging_bytes)


@pytest.mark.parametrize("case", ["tp up, etp down", "collocated"])
def test_host_copies_of_gpu_weights_carry_every_byte(ranks: RankPool, case: str) -> None:
    outcomes = ranks.run(_refit_through_pinned_memory, CASES[case], 64 << 10)
    assert [outcome.wrong for outcome in outcomes] == [[]] * 8
    assert all(outcome.staging_bytes <= 64 << 10 for outcome in outcomes)
    assert any(outcome.staging_bytes > 0 for outcome in outcomes)


def _give_new_storage(*memories: Any) -> None:
    for memory in memories:
        for owner in {id(shard.owner): shard.owner for shard in memory or ()}.values():
            owner.data = owner.data.clone()
        if memory is not None:
            memory.refresh()


def _check(outcomes: list[Outcome], case: Case) -> None:
    assert [outcome.wrong for outcome in outcomes] == [[]] * len(outcomes)
    plan = case.plan
    assert sum(outcome.sent for outcome in outcomes) == int(plan.nbytes[plan.is_wire].sum())
    assert sum(outcome.received for outcome in outcomes) == int(plan.nbytes[plan.is_wire].sum())
    assert sum(outcome.local for outcome in outcomes) == int(plan.nbytes[plan.is_local].sum())


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_every_element_arrives(ranks: RankPool, backend: tuple[str, str], name: str) -> None:
    _check(ranks.run(_refit, CASES[name], backend, 64 << 20), CASES[name])


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("name", ["experts gathered", "collocated"])
def test_a_tiny_staging_bound_is_kept(ranks: RankPool, backend: tuple[str, str], name: str) -> None:
    case, staging_bytes = replace(CASES[name], hidden=96, ffn=192), 32 << 10
    outcomes = ranks.run(_refit, case, backend, staging_bytes)
    _check(outcomes, case)
    assert all(outcome.staging_bytes <= staging_bytes for outcome in outcomes)
    if backend != ("shm", "direct"):
        assert max(outcome.received for outcome in outcomes) > staging_bytes
        assert max(outcome.staging_bytes for outcome in outcomes) > 0


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
def test_large_tensors_are_sent_in_parts_without_packing(ranks: RankPool, backend: tuple[str, str]) -> None:
    case = Case(Layout(2, 2, 2, 1, 4), Layout(2, 1, 2, 1, 2, first_rank=4), hidden=384, ffn=768)
    outcomes = ranks.run(_refit, case, backend, 8 << 20)
    _check(outcomes, case)
    assert all(outcome.staging_bytes <= 8 << 20 for outcome in outcomes)
    assert min(outcome.covered for outcome in outcomes[:6]) > 0.5


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
@pytest.mark.parametrize("name", ["experts gathered", "collocated"])
def test_weights_with_new_storage_between_refits_are_rebound(
    ranks: RankPool, backend: tuple[str, str], name: str
) -> None:
    _check(ranks.run(_refit, CASES[name], backend, 64 << 20, True), CASES[name])


def _refit_without(rank: int, backend: tuple[str, str], absent: int) -> str:
    """The error of a rank whose peer `absent` never runs. The others begin together."""
    case = CASES["experts gathered"]
    options = TransportOptions(staging_bytes=8 << 10, timeout_s=4.0, own=own(*backend))
    memories = case.memory(case.source, rank), case.memory(case.destination, rank)
    program = get_transport(backend[0]).prepare(case.plan, Ranks.of_default_group(), *memories, options)
    torch.distributed.barrier()
    message = ""
    if rank != absent:
        try:
            program.run()
        except RefitError as error:
            message = str(error)
    # No rank leaves early, because a closed connection would be another failure.
    wait_for_all("the end of a refit without a rank")
    return message


def wait_for_all(what: str, num_ranks: int = 8) -> None:
    """A barrier that needs no connection between ranks."""
    store = torch.distributed.distributed_c10d._get_default_store()
    if store.add(what, 1) == num_ranks:
        store.set(f"{what}: all", "")
    store.wait([f"{what}: all"])


@pytest.mark.parametrize(
    ("backend", "absent"),
    [*((b, 1) for b in BACKENDS), *(pytest.param(b, 4, marks=pytest.mark.slow) for b in BACKENDS[:2])],
    ids=str,
)
def test_a_peer_that_does_not_come_is_named(ranks: RankPool, backend: tuple[str, str], absent: int) -> None:
    try:
        messages = ranks.run(_refit_without, backend, absent)
    finally:
        ranks.stop()  # its connections are broken
    assert any(f"rank {absent}" in message for message in messages)
    if absent == 1:
        waiting = [rank for rank in (4, 5) if messages[rank]]
        assert waiting
        assert all("rank 1" in messages[rank] for rank in waiting)


def _die(rank: int) -> None:
    case = CASES["experts gathered"]
    memories = case.memory(case.source, rank), case.memory(case.destination, rank)
    program = get_transport("gloo").prepare(
        case.plan, Ranks.of_default_group(), *memories, TransportOptions(timeout_s=TIMEOUT_S)
    )
    torch.distributed.barrier()
    if rank == 1:
        os._exit(3)
    if not any(transfer.source == 1 for transfer in case.plan.for_rank(rank).receives):
        return
    # Detected when the receive is posted or when it is awaited, depending on when the connection closes.
    with pytest.raises(RefitError, match=r"rank 1 (did not send to|cannot be reached)"):
        program.run()


def test_a_rank_that_dies_ends_its_peers_long_before_the_timeout(ranks: RankPool) -> None:
    assert PATIENCE_S < TIMEOUT_S / 2  # a peer that waits for the timeout gives no answer in time
    with pytest.raises(RankError, match=r"^rank 1: died$"):
        ranks.run(_die)


@pytest.fixture
def segments() -> Iterator[Path]:
    """A folder of shared memory for one test: other programs have segments too."""
    with tempfile.TemporaryDirectory(prefix="refit-test-", dir=shm.DIRECTORY) as folder:
        yield Path(folder)


def _prepare_with_little_shared_memory(rank: int, segments: Path) -> str:
    case = CASES["experts gathered"]
    shm.DIRECTORY = segments
    shm._free_bytes = lambda: 4096 if rank == 5 else 1 << 40  # type: ignore[assignment]
    try:
        get_transport("shm").prepare(
            case.plan,
            Ranks.of_default_group(),
            case.memory(case.source, rank),
            case.memory(case.destination, rank),
            TransportOptions(timeout_s=TIMEOUT_S),
        )
    except UnavailableError as error:
        return str(error)
    return ""


def test_too_little_shared_memory_is_an_error_on_every_rank(ranks: RankPool, segments: Path) -> None:
    messages = ranks.run(_prepare_with_little_shared_memory, segments)
    ranks.stop()  # they are patched
    assert list(segments.iterdir()) == []
    assert messages[6] == messages[7] == ""
    assert len(set(messages[:6])) == 1
    assert "MiB are free" in messages[0]
    assert "--shm-size" in messages[0]


def _segments_left(rank: int, segments: Path) -> tuple[int, int]:
    """How many were created so far in this process, and how many have a name once all ranks have mapped them."""
    case = CASES["experts gathered"]
    memories = case.memory(case.source, rank), case.memory(case.destination, rank)
    with mock.patch.object(shm, "DIRECTORY", segments), mock.patch.object(shm, "_create", wraps=shm._create) as create:
        program = get_transport("shm").prepare(
            case.plan, Ranks.of_default_group(), *memories, TransportOptions(timeout_s=TIMEOUT_S)
        )
    torch.distributed.barrier()
    left = len(os.listdir(segments))
    torch.distributed.barrier()
    program.close()
    return sum(call.args[0].parent == segments for call in create.call_args_list), left


def test_segments_have_no_name_once_mapped(ranks: RankPool, segments: Path) -> None:
    assert ranks.run(_segments_left, segments) == [(1, 0)] * 6 + [(0, 0)] * 2


def test_unknown_transport_lists_the_known() -> None:
    with pytest.raises(UsageError, match="gloo, nccl, nixl, nvshmem, shm"):
        get_transport("tcp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what is missing here")
@pytest.mark.parametrize("name", ["nccl", "nvshmem"])
def test_gpu_transports_say_what_is_missing(name: str) -> None:
    with pytest.raises(UnavailableError, match=f"{name} needs CUDA GPUs.*gloo"):
        get_transport(name).check_available()
    for available in ("gloo", "shm"):
        get_transport(available).check_available()
