"""Rings of chunks between the ranks of a host, and a backend that sends through them and through another one.

`shm+gloo` and `cuda-ipc+nccl` are such backends: messages to ranks of the same host go through rings in memory that
both ends have mapped, the others through Gloo or NCCL, in the same rounds.

Why no rank waits for ever. A chunk waits until the receiver has taken the one that was in its slot; the receiver takes
chunks whenever it waits for chunks. Before a rank waits in the other backend for round j, which blocks it, it has sent
and received all chunks of the rounds up to j. So whoever waits for a rank that is blocked there waits for chunks of a
round behind j, while that rank waits for round j: the executor's induction over rounds holds. A backend that may block
as soon as it posts round j posts it once all chunks of the rounds before j have been sent and received.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from refit.copies.batch import CopyBatch
from refit.memory.phases import counted_apart
from refit.plan.plan import RefitPlan
from refit.transport.one_sided.executor import Backoff
from refit.transport.one_sided.peer_memory import Counter
from refit.transport.one_sided.shm import SharedMemory
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided.backend import BoundMessage, P2PBackend, PendingRound

NUM_SLOTS = 4
"""Of a ring."""

HEADER_BYTES = 64
"""Of a chunk, in shared memory: its bytes, and whether it is the last of its message. A cache line."""

MIN_CHUNK_BYTES = 4 << 10


def ranks_here(plan: RefitPlan, ranks: Ranks) -> list[int]:
    """The plan's ranks on this rank's host."""
    return [rank for rank in plan.ranks if ranks.host_of[rank] == ranks.host_of[ranks.rank]]


class RingHeap(Protocol):
    """Memory of the ranks of a host that chunks go through: one heap per rank, which the others can write."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """This rank's heap, uint8 `[nbytes]`. Collective: every rank of the host."""
        ...

    def peer(self, rank: int) -> torch.Tensor:
        """The heap of `rank`."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Moving:
    """A message of round `number` on its way to or from `peer`: `position` bytes of `buffer` are done."""

    number: int
    peer: int
    buffer: torch.Tensor
    position: int = 0


class Rings:
    """The rings of a plan's ranks on this host. Chunk n of a pair, counted over all runs, uses slot n % NUM_SLOTS."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        heap: RingHeap,
        copy: Callable[[torch.Tensor, torch.Tensor], None],
        chunk_bytes: int,
        timeout_s: float,
        names: tuple[str, str],
        most_bytes: int | None = None,
    ) -> None:
        """`copy(into, part)` has copied when it returns. Chunks have `chunk_bytes`, fewer where the rings of a rank
        would take more than `most_bytes`. `names` are those of the method and of the one to use instead.

        Collective: every rank of the rendezvous, which are those of the plan on this host.
        """
        here = rendezvous.members
        self.peers = frozenset(here) - {rendezvous.rank}
        self._rank, self._timeout_s = rendezvous.rank, timeout_s
        self._heap, self._copy = heap, copy
        self._place = {rank: number for number, rank in enumerate(here)}
        slots = len(here) * NUM_SLOTS
        self._chunk_bytes = chunk_bytes
        if most_bytes is not None:
            share = most_bytes // slots // HEADER_BYTES * HEADER_BYTES
            self._chunk_bytes = min(chunk_bytes, max(MIN_CHUNK_BYTES, share))
        self._flags = SharedMemory(rendezvous, *names)
        self._headers = self._flags.allocate(slots * HEADER_BYTES)
        self._own = heap.allocate(slots * self._chunk_bytes)
        self._num_sent: dict[int, int] = defaultdict(int)
        self._num_received: dict[int, int] = defaultdict(int)
        self._sends: dict[int, deque[_Moving]] = defaultdict(deque)
        self._receives: dict[int, deque[_Moving]] = defaultdict(deque)

    @property
    def nbytes(self) -> int:
        """Of this rank's heap."""
        return self._own.numel()

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
        """Collective, as the constructor."""
        self._heap.close()
        self._flags.close()

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
        if number >= NUM_SLOTS and not self._flags.reached(peer, Counter.CREDIT, number - NUM_SLOTS + 1):
            return False
        part = moving.buffer[moving.position : moving.position + self._chunk_bytes]
        moving.position += part.numel()
        is_last = moving.position == moving.buffer.numel()
        header, data = self._slot(self._flags.peer(peer), self._heap.peer(peer), self._rank, number)
        self._copy(data[: part.numel()], part)
        header[0], header[1] = part.numel(), int(is_last)
        self._num_sent[peer] = number + 1
        self._flags.raise_counter(peer, Counter.ARRIVED, number + 1)
        if is_last:
            queue.popleft()
        return True

    def _take(self, queue: deque[_Moving]) -> bool:
        moving = queue[0]
        peer, number = moving.peer, self._num_received[moving.peer]
        if not self._flags.reached(peer, Counter.ARRIVED, number + 1):
            return False
        header, data = self._slot(self._headers, self._own, peer, number)
        nbytes, is_last = header.tolist()
        self._copy(moving.buffer[moving.position : moving.position + nbytes], data[:nbytes])
        moving.position += nbytes
        self._num_received[peer] = number + 1
        self._flags.raise_counter(peer, Counter.CREDIT, number + 1)
        if is_last:
            queue.popleft()
        return True

    def _slot(
        self, headers: torch.Tensor, heap: torch.Tensor, source: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Header, int64 `[2]`, and data of the slot of chunk `number` from `source` in a rank's memory."""
        slot = self._place[source] * NUM_SLOTS + number % NUM_SLOTS
        header = headers[slot * HEADER_BYTES : slot * HEADER_BYTES + 16].view(torch.int64)
        return header, heap[slot * self._chunk_bytes : (slot + 1) * self._chunk_bytes]


class MixedBackend:
    """The rounds of `far`, with messages to ranks of this host through `rings`.

    A report has the time of each as a phase, named by `within` and `between`: that in which the main thread moves
    chunks, or waits for them, and that in `far`. `blocks`: `far` may block as soon as it posts a round.
    """

    def __init__(self, far: P2PBackend, rings: Rings, within: str, between: str, *, blocks: bool = False) -> None:
        self.traits = far.traits
        self._far, self._rings = far, rings
        self._within, self._between = within, between
        self._blocks = blocks
        self._rounds: dict[int, tuple[int, PendingRound]] = {}

    def begin(self) -> None:
        self._rounds.clear()
        self._far.begin()

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        self._far.pack(sends)

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        near, number = self._rings.peers, len(self._rounds)
        far = PendingRound(
            [each for each in pending.sends if each.peer not in near],
            [each for each in pending.receives if each.peer not in near],
        )
        self._rounds[id(pending)] = number, far
        if self._blocks:
            with counted_apart(self._within):
                self._rings.complete(number - 1)
        with counted_apart(self._between):
            self._far.post(far, reused)
        with counted_apart(self._within):
            self._rings.post(
                number,
                [each for each in pending.sends if each.peer in near],
                [each for each in pending.receives if each.peer in near],
            )

    def wait_sent(self, pending: PendingRound) -> None:
        far = self._moved_here(pending)
        with counted_apart(self._between):
            self._far.wait_sent(far)

    def wait_received(self, pending: PendingRound) -> None:
        far = self._moved_here(pending)
        with counted_apart(self._between):
            self._far.wait_received(far)

    def unpack(self, pending: PendingRound) -> None:
        self._far.unpack(pending)

    def copy_local(self, batch: CopyBatch) -> None:
        self._far.copy_local(batch)

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        self._far.finish(rounds)

    def _moved_here(self, pending: PendingRound) -> PendingRound:
        """The part of a round that goes between hosts, once that within this host is done."""
        number, far = self._rounds[id(pending)]
        with counted_apart(self._within):
            self._rings.complete(number)
        return far
