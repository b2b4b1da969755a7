"""shm+gloo: one refit over both, shared memory between ranks of a host and Gloo between hosts.

The executor is that of Gloo: its messages, its rounds, its relays. A message to a rank of the same host goes through a
ring of chunks in that rank's shared memory, in place of the loopback network.

Why no rank waits for ever. A chunk waits until the receiver has taken the one that was in its slot; the receiver takes
chunks whenever it waits for chunks. Before a rank waits in Gloo for round j, which blocks it, it has sent and received
all chunks of the rounds up to j. So whoever waits for a rank that is blocked there waits for chunks of a round behind
j, while that rank waits for round j: the executor's induction over rounds holds.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refit.config.registry import METHODS
from refit.errors import UsageError
from refit.memory.phases import counted_apart
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, IdleProgram, Program, TransportOptions
from refit.transport.one_sided.executor import Backoff
from refit.transport.one_sided.peer_memory import Counter
from refit.transport.one_sided.shm import SharedMemory, SharedMemoryTransport
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided.backend import BoundMessage, PendingRound
from refit.transport.two_sided.executor import prepare_program
from refit.transport.two_sided.gloo import GlooBackend, GlooLinks, GlooTransport

CHUNK_BYTES = 512 << 10
NUM_SLOTS = 4
"""Of a ring: small enough to stay in cache between the write and the read."""

HEADER_BYTES = 64
"""In front of a chunk: its bytes, and whether it is the last of its message. Aligned, so that copies are."""

WITHIN, BETWEEN = "shm", "gloo"
"""The phases of a report: the time in which the main thread moves chunks, or waits for them, and that in Gloo."""


class SharedGlooTransport(GlooTransport):
    """Moves weights on CPUs."""

    name = "shm+gloo"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        super().check_available(options)
        SharedMemoryTransport().check_available(options)

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Collective: every rank of the plan."""
        for memory in (source, destination):
            if memory is not None and memory.device.type != METHODS[self.name].device:
                raise UsageError(f"{self.name} moves weights in CPU memory, these are on {memory.device}: use nccl")
        if ranks.rank not in plan.ranks:
            return IdleProgram()
        self.connect(plan, ranks, options)
        links = self._connected.pop(plan.digest)
        rings = Rings(plan, ranks, options.timeout_s)
        backend = SharedGlooBackend(links, rings, options.timeout_s)

        def release() -> None:
            rings.close()
            links.close()

        return prepare_program(plan, ranks.rank, backend, source, destination, options, release)


@dataclass(slots=True)
class _Moving:
    """A message of round `number` on its way to or from `peer`: `position` bytes of `buffer` are done."""

    number: int
    peer: int
    buffer: torch.Tensor
    position: int = 0


class Rings:
    """The rings of a plan's ranks on this host. Chunk n of a pair, counted over all runs, uses slot n % NUM_SLOTS."""

    def __init__(self, plan: RefitPlan, ranks: Ranks, timeout_s: float) -> None:
        """Collective: every rank of the plan on this host."""
        here = [rank for rank in plan.ranks if ranks.host_of[rank] == ranks.host_of[ranks.rank]]
        self.peers = frozenset(here) - {ranks.rank}
        self._rank, self._timeout_s = ranks.rank, timeout_s
        self._memory = SharedMemory(Rendezvous(ranks, f"rings/{plan.digest}/{here[0]}", here, timeout_s), "shm+gloo")
        self._place = {rank: number for number, rank in enumerate(here)}
        self._own = self._memory.allocate(len(here) * NUM_SLOTS * (HEADER_BYTES + CHUNK_BYTES))
        self._num_sent: dict[int, int] = defaultdict(int)
        self._num_received: dict[int, int] = defaultdict(int)
        self._sends: dict[int, deque[_Moving]] = defaultdict(deque)
        self._receives: dict[int, deque[_Moving]] = defaultdict(deque)

    def post(self, number: int, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> None:
        """Start the messages of round `number`."""
        for bound in receives:
            self._receives[bound.peer].append(_Moving(number, bound.peer, bound.buffer))
        for bound in sends:
            self._sends[bound.peer].append(_Moving(number, bound.peer, bound.buffer[: bound.filled_bytes]))
        self._progress()

    def complete(self, number: int) -> None:
        """Wait until all messages of the rounds up to `number` have been sent and have arrived.

        Raises RefitError, naming the peer, where nothing moves for too long.
        """
        backoff = Backoff(self._timeout_s)
        while (peer := self._awaited(number)) is not None:
            if self._progress():
                backoff.renew()
            else:
                backoff.wait(self._rank, peer)

    def close(self) -> None:
        self._memory.close()

    def _awaited(self, number: int) -> int | None:
        """A peer with which a message of the rounds up to `number` is on its way."""
        for queues in (self._receives, self._sends):
            for peer, queue in queues.items():
                if queue and queue[0].number <= number:
                    return peer
        return None

    def _progress(self) -> bool:
        """Move a chunk of each pair, where one can be moved."""
        moved = [self._take(queue) for queue in self._receives.values() if queue]
        moved += [self._give(queue) for queue in self._sends.values() if queue]
        return any(moved)

    def _give(self, queue: deque[_Moving]) -> bool:
        moving = queue[0]
        peer, number = moving.peer, self._num_sent[moving.peer]
        if number >= NUM_SLOTS and not self._memory.reached(peer, Counter.CREDIT, number - NUM_SLOTS + 1):
            return False
        part = moving.buffer[moving.position : moving.position + CHUNK_BYTES]
        moving.position += part.numel()
        is_last = moving.position == moving.buffer.numel()
        header, data = self._slot(self._memory.peer(peer), self._rank, number)
        data[: part.numel()].copy_(part)
        header[0], header[1] = part.numel(), int(is_last)
        self._num_sent[peer] = number + 1
        self._memory.raise_counter(peer, Counter.ARRIVED, number + 1)
        if is_last:
            queue.popleft()
        return True

    def _take(self, queue: deque[_Moving]) -> bool:
        moving = queue[0]
        peer, number = moving.peer, self._num_received[moving.peer]
        if not self._memory.reached(peer, Counter.ARRIVED, number + 1):
            return False
        header, data = self._slot(self._own, peer, number)
        nbytes, is_last = header.tolist()
        moving.buffer[moving.position : moving.position + nbytes].copy_(data[:nbytes])
        moving.position += nbytes
        self._num_received[peer] = number + 1
        self._memory.raise_counter(peer, Counter.CREDIT, number + 1)
        if is_last:
            queue.popleft()
        return True

    def _slot(self, heap: torch.Tensor, source: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Header, int64 `[2]`, and data of the slot of chunk `number` from `source` in a heap."""
        size = HEADER_BYTES + CHUNK_BYTES
        start = (self._place[source] * NUM_SLOTS + number % NUM_SLOTS) * size
        return heap[start : start + 16].view(torch.int64), heap[start + HEADER_BYTES : start + size]


class SharedGlooBackend(GlooBackend):
    """The rounds of Gloo, with messages to ranks of this host through `rings`."""

    def __init__(self, links: GlooLinks, rings: Rings, timeout_s: float) -> None:
        super().__init__(links, timeout_s)
        self._rings = rings
        self._far: dict[int, tuple[int, PendingRound]] = {}

    def begin(self) -> None:
        self._far.clear()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        near, number = self._rings.peers, len(self._far)
        far = PendingRound(
            [each for each in pending.sends if each.peer not in near],
            [each for each in pending.receives if each.peer not in near],
        )
        self._far[id(pending)] = number, far
        with counted_apart(BETWEEN):
            super().post(far, None)
        with counted_apart(WITHIN):
            self._rings.post(
                number,
                [each for each in pending.sends if each.peer in near],
                [each for each in pending.receives if each.peer in near],
            )

    def wait_sent(self, pending: PendingRound) -> None:
        far = self._moved_here(pending)
        with counted_apart(BETWEEN):
            super().wait_sent(far)

    def wait_received(self, pending: PendingRound) -> None:
        far = self._moved_here(pending)
        with counted_apart(BETWEEN):
            super().wait_received(far)

    def _moved_here(self, pending: PendingRound) -> PendingRound:
        """The part of a round that goes between hosts, once that within this host is done."""
        number, far = self._far[id(pending)]
        with counted_apart(WITHIN):
            self._rings.complete(number)
        return far
