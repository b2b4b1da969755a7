"""The one-sided executor over a substrate that executes in the order of enqueueing. Ranks are threads.

A GPU whose streams all share one hardware queue behaves so. It is the strictest case that the executor can meet.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch

from refit.config.layout import Layout
from refit.copies.batch import CopyBatch
from refit.errors import RefitError
from refit.memory.weights import LocalWeights, Storages
from refit.plan.plan import RefitPlan
from refit.transport.messages import Framing
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.in_place import InPlaceBuffers
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.one_sided.receive_buffers import DirectBuffers, ReceiveBuffers, RingBuffers
from refit.transport.schedule import make_schedule
from refit.transport.turns import in_turn
from tests.plan.strategies import staged
from tests.seams import nonzero_rows
from tests.transport.synthetic import Case, fill, poison, wrong_tensors

TIMEOUT_S = 100.0


@dataclass
class World:
    """State that all ranks share: heaps, counters `(owner, kind, about) -> value`, and exchanged values."""

    num_ranks: int
    heaps: dict[int, torch.Tensor] = field(default_factory=dict)
    counters: dict[tuple[int, Counter, int], int] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    published: dict[tuple[int, str], Any] = field(default_factory=dict)
    num_mapped: int = 0
    gate: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.gate = threading.Barrier(self.num_ranks, timeout=TIMEOUT_S)


class QueuedMemory:
    """A `PeerMemory` with one queue of steps. A step returns False as long as it has to wait."""

    local_batch_bytes = 1 << 10

    def __init__(self, rank: int, world: World, mapped: bool) -> None:
        self.rank, self.enqueues = rank, False
        self._world, self._mapped = world, mapped
        self._queue: deque[Callable[[], bool]] = deque()

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        self._world.values[self.rank] = value
        self._world.gate.wait()
        found = dict(self._world.values)
        self._world.gate.wait()
        return found if wanted is None else {rank: found[rank] for rank in wanted}

    def is_mapped(self, rank: int) -> bool:
        return self._mapped

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._world.heaps[self.rank] = torch.zeros(nbytes, dtype=torch.uint8)
        self._world.gate.wait()
        return self._world.heaps[self.rank]

    def peer(self, rank: int) -> torch.Tensor:
        assert self._mapped
        return self._world.heaps[rank]

    def begin(self, has_new_copies: bool) -> None:
        self.enqueues = not has_new_copies

    def send(self, peer: int, put: Put, value: int) -> None:
        self._run(put.batch)
        if put.packed is not None:
            packed = put.packed
            place = self._world.heaps[peer][put.offset : put.offset + packed.numel()]
            self._do(lambda: place.copy_(packed))
        self.raise_counter(peer, Counter.ARRIVED, value)

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        self._run(batch)

    def copy_local(self, batch: CopyBatch) -> None:
        self._run(batch)

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        self._do(lambda: self._world.counters.__setitem__((peer, counter, self.rank), value))

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        def is_reached() -> bool:
            return self._world.counters.get((self.rank, counter, peer), 0) >= value

        if self.enqueues:
            self._queue.append(is_reached)
            return True
        return is_reached()

    def finish(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self._queue:
            if self._queue[0]():
                self._queue.popleft()
            elif time.monotonic() > deadline:
                raise RefitError(f"rank {self.rank} hangs with {len(self._queue)} steps to go")
            else:
                time.sleep(1e-5)

    def barrier(self) -> None:
        self.exchange(None)

    def close(self) -> None:
        self.barrier()

    def _run(self, batch: CopyBatch) -> None:
        """As on a GPU, hooks are called when a batch is enqueued, and its copies are executed later."""
        if batch.before is not None:
            batch.before()
        self._do(partial(_without_hooks, batch))
        if batch.after is not None:
            batch.after()

    def _do(self, action: Callable[[], Any]) -> None:
        if self.enqueues:
            self._queue.append(lambda: (action(), True)[1])
        else:
            action()


def _without_hooks(batch: CopyBatch) -> None:
    hooks = batch.before, batch.after
    batch.before = batch.after = None
    batch.run()
    batch.before, batch.after = hooks


class SharedAddresses(QueuedMemory):
    """`SharedStorages` of threads, which have one address space: a handle is the memory itself. The host waits."""

    def begin(self, has_new_copies: bool) -> None:
        pass

    def share(self, region: torch.Tensor, peers: Sequence[int]) -> dict[int, Any]:
        return dict.fromkeys(peers, region)

    def map(self, handles: Sequence[Any]) -> list[torch.Tensor]:
        self._world.num_mapped += len(handles)
        return list(handles)

    def publish(self, key: str, value: Any) -> None:
        self._world.published[self.rank, key] = value

    def fetch(self, rank: int, key: str) -> Any:
        return self._world.published[rank, key]


def _buffers(destination: LocalWeights | None, kind: str, window: int, slot_bytes: int) -> ReceiveBuffers:
    if kind == "direct":
        return DirectBuffers(destination)
    return RingBuffers(destination, window, slot_bytes)


def _run(
    program: OneSidedProgram, source: LocalWeights | None, destination: Any, plan: RefitPlan, iteration: int
) -> list[str]:
    """One run of this rank, and the tensors that are wrong after it."""
    if source is not None:
        fill(source, iteration)
    if destination is not None:
        poison(destination)
        time.sleep(0.02)  # lets the sources get a run ahead
    program.run()
    return wrong_tensors(destination, plan, iteration) if destination is not None else []


def _rank(
    case: Case, plan: RefitPlan, kind: str, window: int, packs: bool, rank: int, world: World, problems: list[str]
) -> None:
    """Four runs. A rank starts the next one as soon as it can. `packs`: messages are packed by an encoding."""
    slot_bytes = 1 << 10
    memory = QueuedMemory(rank, world, mapped=kind != "put")
    try:
        source: LocalWeights | None = case.memory(case.source, rank)
        destination: LocalWeights | None = case.memory(case.destination, rank)
        framing = Framing(slot_bytes, None)
        if packs:
            source, destination = nonzero_rows.packed(source), nonzero_rows.packed(destination)
            framing = replace(framing, max_bytes=nonzero_rows.max_bytes)
        buffers = _buffers(destination, kind, window, slot_bytes)
        schedule = make_schedule(plan, rank, framing)
        buffers.attach(memory, schedule)
        program = OneSidedProgram(schedule, memory, buffers, source, destination, TIMEOUT_S)
        for iteration in range(4):
            problems += [
                f"{rank}, run {iteration}: {key}" for key in _run(program, source, destination, plan, iteration)
            ]
        program.close()
    except Exception as error:
        problems.append(f"{rank}: {error!r}")
        world.gate.abort()


APART = Case(Layout(2, 2, 1, 1, 2), Layout(1, 2, 1, 1, 2, first_rank=2))
TOGETHER = Case(Layout(2, 2, 2, 1, 4), Layout(4, 4, 1, 1, 4))


BUFFERS = [("ring", 1), ("ring", 2), ("ring", 5), ("put", 2), ("direct", 0)]
PACKED_OR_NOT = [*((*each, False) for each in BUFFERS), ("ring", 1, True), ("ring", 2, True), ("put", 2, True)]


@pytest.mark.parametrize("case", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize(("kind", "window", "packs"), PACKED_OR_NOT)
def test_work_enqueued_in_one_queue_per_rank_ends_and_is_right(case: Case, kind: str, window: int, packs: bool) -> None:
    _run_in_threads(case, case.plan, kind, window, packs)


REPLICATED = Case(Layout(2, 2, 1, 1, 2), Layout(1, 2, 1, 1, 6))
"""Three replicas, two of whose ranks are the source's."""


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize(("kind", "window", "packs"), PACKED_OR_NOT)
def test_stages_enqueued_in_one_queue_per_rank_end_and_are_right(
    num_stages: int, kind: str, window: int, packs: bool
) -> None:
    _run_in_threads(REPLICATED, staged(*REPLICATED.plan.shardings, num_stages, Random(7)), kind, window, packs)


def _run_in_threads(case: Case, plan: RefitPlan, kind: str, window: int, packs: bool) -> None:
    in_threads(partial(_rank, case, plan, kind, window, packs), len(plan.ranks))


def in_threads(rank: Callable[[int, World, list[str]], None], num_ranks: int) -> World:
    world, problems = World(num_ranks), list[str]()
    threads = [threading.Thread(target=rank, args=(number, world, problems)) for number in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    return world


def _give_new_storage(memory: LocalWeights | None) -> None:
    for owner in {id(shard.owner): shard.owner for shard in memory or ()}.values():
        owner.data = owner.data.clone()
    if memory is not None:
        memory.refresh()


def _rank_in_place(
    case: Case, plan: RefitPlan, message_bytes: int, moves: bool, rank: int, world: World, problems: list[str]
) -> None:
    """Four runs. With `moves`, the weights of both sides get new storage before the second and the fourth."""
    memory = SharedAddresses(rank, world, mapped=True)
    try:
        source, destination = case.memory(case.source, rank), case.memory(case.destination, rank)
        schedule = in_turn(make_schedule(plan, rank, Framing(message_bytes, None)), plan)
        buffers = InPlaceBuffers(memory, schedule, destination, engine_bytes=64)
        program = OneSidedProgram(schedule, memory, buffers, source, destination, TIMEOUT_S)
        for iteration in range(4):
            if moves and iteration % 2:
                _give_new_storage(source)
                _give_new_storage(destination)
            problems += [
                f"{rank}, run {iteration}: {key}" for key in _run(program, source, destination, plan, iteration)
            ]
        assert program.staging_bytes == 0
        program.close()
    except Exception as error:
        problems.append(f"{rank}: {error!r}")
        world.gate.abort()


@pytest.mark.parametrize("case", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("moves", [False, True])
def test_weights_are_written_where_they_are_and_found_again_when_they_move(case: Case, moves: bool) -> None:
    world = in_threads(partial(_rank_in_place, case, case.plan, 1 << 62, moves), len(case.plan.ranks))
    assert bool(world.published) == moves
    assert max((int(key.split("/")[1]) for _, key in world.published), default=0) == (2 if moves else 0)


@pytest.mark.parametrize("moves", [False, True])
def test_a_rank_alone_looks_for_its_weights_batch_by_batch(moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that have not moved, only the first run looks for all before it copies."""
    looked = []
    whole = OneSidedProgram._rebind_if_moved
    monkeypatch.setattr(OneSidedProgram, "_rebind_if_moved", lambda self: looked.append(self) or whole(self))
    case = Case(Layout(1, 1, 1, 1, 1), Layout(1, 1, 1, 1, 1))
    in_threads(partial(_rank_in_place, case, case.plan, 1 << 62, moves), 1)
    assert len(looked) == (3 if moves else 1)


def test_weights_that_have_moved_unnoticed_are_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storages, "have_moved", lambda self: False)
    case = Case(Layout(1, 1, 1, 1, 1), Layout(1, 1, 1, 1, 1))
    with pytest.raises(AssertionError, match="run 1"):
        in_threads(partial(_rank_in_place, case, case.plan, 1 << 62, True), 1)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("message_bytes", [1 << 10, 1 << 62])
def test_what_was_written_where_it_is_is_passed_on_from_there(message_bytes: int, moves: bool) -> None:
    plan = staged(*REPLICATED.plan.shardings, 3, Random(8))
    in_threads(partial(_rank_in_place, REPLICATED, plan, message_bytes, moves), len(plan.ranks))
