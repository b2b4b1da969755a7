"""The protocols between the one-sided executor and its substrates: memory that peers write, counters, and puts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch

from refit.copies.batch import CopyBatch


class Counter(IntEnum):
    """The counters that each rank keeps for each of its peers.

    ARRIVED counts messages, CREDIT those that may be written, MOVED how often the peer's weights have new storage.
    """

    ARRIVED = 0
    CREDIT = 1
    MOVED = 2


@dataclass(frozen=True, slots=True)
class Put:
    """The write of one message into a peer's memory.

    `batch` writes it there where that memory is mapped. Otherwise `batch` packs it into `packed`, uint8 in this rank's
    heap, which is then sent as a whole to byte `offset` of the peer's heap.
    """

    batch: CopyBatch
    packed: torch.Tensor | None = None
    offset: int = 0


class PeerMemory(Protocol):
    """Memory that other ranks can write: the interface of a one-sided substrate.

    A substrate on CUDA streams may enqueue a run: then `reached` enqueues a wait and returns True, and only `finish`
    waits on the host. `enqueues` is whether it does so in the current run. `local_batch_bytes` is the size of batches
    of local copies that it wants.
    """

    rank: int
    enqueues: bool
    local_batch_bytes: int

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        """See `Rendezvous.exchange`. Collective."""
        ...

    def begin(self, has_new_copies: bool) -> None:
        """Open a run. `has_new_copies`: it includes copies that have not run before."""
        ...

    def send(self, peer: int, put: Put, value: int) -> None:
        """Write a message into the memory of `peer`, then set the ARRIVED that it keeps for this rank to `value`."""
        ...

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        """Copy a message of `peer` out of this rank's memory, before counters that are raised for `peer` later."""
        ...

    def copy_local(self, batch: CopyBatch) -> None:
        """Run copies that stay on this rank."""
        ...

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        """Set the counter that `peer` keeps for this rank to `value`, which must not be less than before."""
        ...

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        """Whether the counter that this rank keeps for `peer` is at least `value`. If so, its message is visible."""
        ...

    def finish(self) -> None:
        """Wait for all work that the run has enqueued. Raises RefitError, naming peers, after the timeout."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks have called. Collective."""
        ...

    def close(self) -> None:
        """Drop all mappings. Tensors in them must not be used afterwards. Collective."""
        ...


class PeerHeap(PeerMemory, Protocol):
    """Peer memory whose substrate allocates what peers write: one heap per rank."""

    def is_mapped(self, rank: int) -> bool:
        """Whether this rank can write the heap of `rank` by copies. If not, `send` needs packed messages for it."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate this rank's heap, uint8 `[nbytes]`, zeroed. Collective. Raises the same RefitError on all ranks."""
        ...

    def peer(self, rank: int) -> torch.Tensor:
        """The heap of `rank`, which must be mapped, as uint8 that this rank can write."""
        ...
