"""Memory of GPUs of one host that ranks open by CUDA IPC, and the streams that write it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from refit.copies.batch import CopyBatch
from refit.memory.streams import is_over, late_peers_error, new_stream
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.one_sided.shm import SharedMemory
from refit.transport.rendezvous import Rendezvous

LOCAL_BATCH_BYTES = 4 << 30
"""In one launch: on H200, copy engines keep 365 of their 368 GB/s beside local copies at full speed."""

HEAP_BYTES = 512

DEVICE = 6
"""The index of the owner's device number among the arguments that rebuild a shared tensor."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message whose copies are enqueued: `value` is what ARRIVED becomes at `peer` once `event` is over."""

    peer: int
    value: int
    event: torch.cuda.Event


class IpcMemory:
    """The `SharedStorages` of GPUs on one host."""

    enqueues = False
    local_batch_bytes = LOCAL_BATCH_BYTES

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        """Collective: every rank of the rendezvous."""
        self.rank = rendezvous.rank
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s
        self._flags = SharedMemory(rendezvous, "cuda-ipc", "nccl")
        self._flags.allocate(0)
        self._device = here()
        # A higher priority than local copies, for which no peer waits.
        self._large, self._pieces = (new_stream(self._device, -1) for _ in range(2))
        self._local = new_stream(self._device)
        self._sent: deque[_Sent] = deque()
        self._shared: list[torch.Tensor] = []

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        return self._rendezvous.exchange(value, wanted)

    def publish(self, key: str, value: Any) -> None:
        self._rendezvous.publish(key, value)

    def fetch(self, rank: int, key: str) -> Any:
        return self._rendezvous.fetch(rank, key)

    def share(self, region: torch.Tensor, peers: Sequence[int]) -> dict[int, Any]:
        self._shared.append(_alias(region))
        return handles_of(self._shared[-1], peers)

    def map(self, handles: Sequence[Any]) -> list[torch.Tensor]:
        return [open_region(handle) for handle in handles]

    def begin(self, has_new_copies: bool) -> None:
        # Credit, which follows, allows peers to overwrite weights that the caller's stream may still be using.
        torch.cuda.current_stream(self._device).synchronize()

    def send(self, peer: int, put: Put, value: int) -> None:
        """Enqueue a message. The next one starts when both of its parts have ended, so that peers take turns."""
        with torch.cuda.stream(self._large):
            put.batch.run_large()
        with torch.cuda.stream(self._pieces):
            put.batch.run_pieces()
        self._large.wait_stream(self._pieces)
        self._pieces.wait_stream(self._large)
        self._sent.append(_Sent(peer, value, self._large.record_event()))

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        # Nothing to copy, but hooks to call. The peer has reported once its copies had ended, so whatever this rank
        # starts from here on, on any stream, finds the weights written.
        batch.run()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._local):
            batch.run()

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        self._flags.raise_counter(peer, counter, value)

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        self._report_sent()
        return self._flags.reached(peer, counter, value)

    def finish(self) -> None:
        """Wait on the host until all copies of this rank have ended."""
        local = self._local.record_event()
        deadline = time.monotonic() + self._timeout_s
        while self._report_sent() or not is_over(local):
            if time.monotonic() > deadline:
                raise late_peers_error(self.rank, [sent.peer for sent in self._sent], self._timeout_s)
            time.sleep(0)

    def barrier(self) -> None:
        torch.cuda.synchronize(self._device)
        self.exchange(None)

    def close(self) -> None:
        """Wait until no rank has memory of another one open, then let PyTorch free what was shared."""
        self._sent.clear()
        self.barrier()
        self._flags.close()
        self._shared.clear()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def _report_sent(self) -> bool:
        """Report the messages whose copies have ended. Returns whether any are left."""
        while self._sent and is_over(self._sent[0].event):
            sent = self._sent.popleft()
            self._flags.raise_counter(sent.peer, Counter.ARRIVED, sent.value)
        return bool(self._sent)


class IpcHeap(IpcMemory):
    """The `PeerHeap` of GPUs on one host, for messages that a destination unpacks."""

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        """Collective: every rank of the rendezvous."""
        super().__init__(rendezvous, timeout_s)
        self._heaps: dict[int, torch.Tensor] = {}

    def is_mapped(self, rank: int) -> bool:
        return True

    def allocate(self, nbytes: int) -> torch.Tensor:
        # Every handle that is given must be opened, so there is memory on ranks that receive nothing too.
        heap = torch.zeros(max(nbytes, HEAP_BYTES), dtype=torch.uint8, device=self._device)
        torch.cuda.synchronize(self._device)
        others = [rank for rank in self._rendezvous.members if rank != self.rank]
        offers = self.exchange(self.share(heap, others), others)
        self._heaps = {rank: self.map([offers[rank][self.rank]])[0] for rank in others}
        self._heaps[self.rank] = heap
        return heap[:nbytes]

    def peer(self, rank: int) -> torch.Tensor:
        return self._heaps[rank]

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        """The host gives credit for the slot as soon as this returns."""
        batch.run()
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self._heaps.clear()
        super().close()


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _alias(region: torch.Tensor) -> torch.Tensor:
    """The memory of `region` as a storage of its own, which does not own it.

    PyTorch ties a shared storage to its peers for as long as it lives. A model's storages must stay free of that. A
    storage that owned a Python object would need the interpreter to be freed, perhaps after its end.
    """
    address, nbytes = region.data_ptr(), region.numel()
    storage = torch._C._construct_storage_from_data_pointer(address, region.device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=region.device).set_(storage)


def handles_of(shared: torch.Tensor, peers: Sequence[int]) -> dict[int, Any]:
    """Peer -> what rebuilds `shared` there. `shared` must live until all peers have closed it.

    PyTorch counts one user per handle and frees the memory when that one has closed it, so every peer gets its own.
    """
    return {peer: reduce_tensor(shared) for peer in peers}  # type: ignore[no-untyped-call]


def open_region(handle: Any) -> torch.Tensor:
    """The region behind `handle`, what `reduce_tensor` gave its owner, mapped for this rank's GPU.

    Mapped for the owner's device number instead, kernels fault and copies run at 37 GB/s (H200).
    """
    rebuild, arguments = handle
    region: torch.Tensor = rebuild(*arguments[:DEVICE], torch.cuda.current_device(), *arguments[DEVICE + 1 :])
    return region
