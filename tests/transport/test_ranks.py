"""Refits of some processes with a store and numbers of their own, beside a default process group of another size."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from refit.config.layout import Layout
from refit.errors import RefitError, UnavailableError, UsageError
from refit.transport import ranks as transport_ranks
from refit.transport.base import TransportOptions, get_transport
from refit.transport.one_sided import nvshmem_library
from refit.transport.ranks import Ranks, host_name
from tests.ranks.pool import RankPool
from tests.transport.synthetic import Case, fill, own, poison, wrong_tensors
from tests.transport.test_transports import BACKENDS, TIMEOUT_S

pytestmark = pytest.mark.no_megatron

PROCESSES = (6, 1, 7, 4, 3, 0)
"""Those that take part, in the order of their ranks. In the default group they have these numbers, of 8."""

CASE = Case(Layout(2, 2, 2, 1, 4), Layout(2, 1, 2, 1, 2, first_rank=3), hidden=96, ffn=192)
"""Ranks 0 to 4 of 6: rank 3 is in both sides, rank 5 is idle."""


def _store(kind: str, place: Any, size: int) -> Any:
    if kind == "file":
        return FileStore(str(place), size)
    # The default group's processes use the same server under other names.
    return PrefixStore("refits", TCPStore("localhost", place, is_master=False, timeout=timedelta(seconds=TIMEOUT_S)))


@contextlib.contextmanager
def _busy_default_group() -> Iterator[list[int]]:
    """All processes add up numbers over the default group, in a thread, until every one has left. Yields the sums."""
    sums: list[int] = []
    left = threading.Event()

    def add_up() -> None:
        while True:
            numbers = torch.tensor([dist.get_rank(), int(left.is_set())])
            dist.all_reduce(numbers)
            sums.append(int(numbers[0]))
            if int(numbers[1]) == dist.get_world_size():
                return

    thread = threading.Thread(target=add_up, daemon=True)
    thread.start()
    try:
        yield sums
    finally:
        left.set()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def _refits(process: int, kind: str, place: Any, backend: tuple[str, str]) -> tuple[list[str], int, set[int], int]:
    """Three refits over a part of the processes. Returns what was wrong, the bytes received, and the default group's
    sums: their values, and how many there were during the refits of this process.
    """
    with _busy_default_group() as sums:
        wrong, received, num_during = [], 0, 0
        if process in PROCESSES:
            rank, size = PROCESSES.index(process), len(PROCESSES)
            ranks = Ranks.meet(rank, size, _store(kind, place, size))
            source, destination = CASE.memory(CASE.source, rank), CASE.memory(CASE.destination, rank)
            options = TransportOptions(staging_bytes=1 << 20, timeout_s=TIMEOUT_S, own=own(*backend))
            transport = get_transport(backend[0])
            transport.connect(CASE.plan, ranks, options)
            program = transport.prepare(CASE.plan, ranks, source, destination, options)
            num_before = len(sums)
            for iteration in range(3):
                if source is not None:
                    fill(source, iteration)
                if destination is not None:
                    poison(destination)
                _wait_for_all(ranks, f"filled {iteration}")
                num_sums = len(sums)
                received += program.run().wire_bytes_received
                while len(sums) == num_sums:  # the default group is at work, however short the refit was
                    time.sleep(0.001)
                if destination is not None:
                    wrong += wrong_tensors(destination, CASE.plan, iteration)
                _wait_for_all(ranks, f"checked {iteration}")
            num_during = len(sums) - num_before
            program.close()
    return wrong, received, set(sums), num_during


def _wait_for_all(ranks: Ranks, what: str) -> None:
    if ranks.store.add(what, 1) == ranks.size:
        ranks.store.set(f"{what}: all", "")
    ranks.store.wait([f"{what}: all"], timedelta(seconds=TIMEOUT_S))


@pytest.fixture(params=["file", "tcp"])
def meeting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A kind of store, and where it is."""
    if request.param == "file":
        yield "file", tmp_path / "store"
        return
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield "tcp", server.port


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
def test_a_part_of_the_processes_refits_while_all_use_the_default_group(
    ranks: RankPool, meeting: tuple[str, Any], backend: tuple[str, str]
) -> None:
    found = ranks.run(_refits, *meeting, backend)
    assert [wrong for wrong, *_ in found] == [[]] * 8
    plan = CASE.plan
    assert sum(received for _, received, *_ in found) == 3 * int(plan.nbytes[plan.is_wire].sum()) > 0
    assert all(sums == {sum(range(8))} for _, _, sums, _ in found)
    assert all(found[process][3] > 0 for process in PROCESSES)  # both were in use at the same time


def _prepared_on_two_hosts(rank: int) -> str:
    ranks = replace(Ranks.of_default_group(), host_of=("near",) * 4 + ("far",) * 4)
    case = replace(CASE, destination=replace(CASE.destination, first_rank=4))
    memories = case.memory(case.source, rank), case.memory(case.destination, rank)
    try:
        get_transport("shm").prepare(case.plan, ranks, *memories, TransportOptions(timeout_s=TIMEOUT_S))
    except UnavailableError as error:
        return str(error)
    return ""


def test_shared_memory_is_refused_where_the_plans_ranks_have_several_hosts(ranks: RankPool) -> None:
    refused = "shm needs all ranks on one host, these are on 2 (far, near): use gloo"
    assert ranks.run(_prepared_on_two_hosts) == [refused] * 6 + [""] * 2


def _hosts(rank: int) -> tuple[int, int, list[str]]:
    ranks = Ranks.of_default_group()
    return ranks.rank, ranks.size, ranks.hosts(range(ranks.size))


def test_the_default_groups_ranks_know_their_hosts(ranks: RankPool) -> None:
    found = ranks.run(_hosts)
    assert [(rank, size) for rank, size, _ in found] == [(rank, 8) for rank in range(8)]
    assert all(hosts == found[0][2] and len(hosts) == 1 for *_, hosts in found)


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_does_not_come_to_meet_is_named(tmp_path: Path, rank: int, missing: int) -> None:
    store = FileStore(str(tmp_path / "store"), 2)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RefitError, match=f"^rank {missing} did not come to meet the other ranks: ") as caught:
        Ranks.meet(rank, 2, store)
    assert "\n" not in str(caught.value)


def test_nvshmem_numbers_a_process_once() -> None:
    nvshmem_library.check_pe(None, (1, 4))
    nvshmem_library.check_pe((1, 4), (1, 4))
    with pytest.raises(UsageError, match=r"was rank 1 of 4 before and is rank 0 of 2 now: use nccl"):
        nvshmem_library.check_pe((1, 4), (0, 2))


def on_hosts(*names: str) -> Ranks:
    return Ranks(0, len(names), cast(Any, None), names)


def test_ranks_fill_hosts_in_order() -> None:
    assert on_hosts("a", "a", "b", "b").ranks_per_host == 2
    assert on_hosts("a", "a", "b").ranks_per_host == 2, "the last host may have fewer"
    assert on_hosts("a", "a", "a").ranks_per_host == 3


@pytest.mark.parametrize("names", ["abab", "aabbb", "abb", "aba"])
def test_ranks_that_do_not_fill_hosts_in_order_are_refused(names: str) -> None:
    with pytest.raises(UsageError, match=f"^{len(names)} ranks do not fill 2 hosts in order, ") as caught:
        _ = on_hosts(*names).ranks_per_host
    assert "\n" not in str(caught.value)


def test_the_launcher_names_a_host_else_machine_and_namespace_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFIT_HOST", raising=False)
    assert host_name().startswith(f"{socket.gethostname()} in network namespace ")
    monkeypatch.setenv("REFIT_HOST", "rack7")
    assert host_name() == "rack7"


def _meets(store: Any, names: list[str]) -> list[str]:
    for rank, name in enumerate(names[1:], 1):
        store.set(f"refit/host/{rank}", name)
    with mock.patch.object(transport_ranks, "host_name", return_value=names[0]):
        return list(Ranks.meet(0, len(names), store).host_of)


def test_namespaces_are_named_only_where_a_machine_has_several() -> None:
    name = "{} in network namespace {}".format
    apart = [name("a", 1), name("a", 2), name("b", 1)]
    assert _meets(HashStore(), apart) == [name("a", 1), name("a", 2), "b"]
    assert _meets(HashStore(), [name("a", 1), name("b", 1)]) == ["a", "b"]
