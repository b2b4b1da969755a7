"""Symmetric GPU memory of NVSHMEM, and the streams that order its use.

Copy kernels write peers over NVLink through mapped memory. For other peers, a message is packed into a slot of the
source's own symmetric memory, as the network requires, and sent by `putmem_signal`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from refit.copies.batch import CopyBatch
from refit.memory.streams import late_peers_error, new_stream, wait_for_events
from refit.transport.base import TransportOptions
from refit.transport.one_sided import nvshmem_library as library
from refit.transport.one_sided.options import NvshmemOptions
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.rendezvous import Rendezvous

HEAP_BYTES = 512
"""The size of the symmetric heap is a multiple of this."""

LOCAL_BATCH_BYTES = 512 << 20
CELL_BYTES = 64
MAX_STREAMS = 8
"""Streams per direction. Peers share them where there are more."""


class NvshmemMemory:
    """The `PeerMemory` of GPUs. Ranks are PEs. One symmetric allocation holds the counters, another the heap.

    In a run with copies that have not run before, the host polls the counters instead of making streams wait: loading
    a kernel may wait for the whole GPU (CUDA programming guide, lazy loading), hence for streams that wait for a peer,
    which may in turn wait for this rank.
    """

    local_batch_bytes = LOCAL_BATCH_BYTES

    def __init__(self, rendezvous: Rendezvous, options: TransportOptions) -> None:
        """Collective: every member of the rendezvous."""
        self.rank = rendezvous.rank
        self.enqueues = False
        self._rendezvous = rendezvous
        self._timeout_s = options.timeout_s
        self._force_put = options.own_as(NvshmemOptions).force_put
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._core = library.load()
        # The bindings accept addresses. The functions of nvshmem.core need whole allocations; these are parts.
        self._calls = importlib.import_module("nvshmem.bindings")
        self._set = int(self._core.SignalOp.SIGNAL_SET)
        self._at_least = int(self._core.ComparisonType.CMP_GE)
        self._counters = self._symmetric(len(Counter) * len(rendezvous.members) * CELL_BYTES)
        self._heap: torch.Tensor | None = None
        self._seen = [0] * (len(Counter) * len(rendezvous.members))
        self._host_counters = torch.empty(self._counters.shape, dtype=torch.uint8, pin_memory=True)
        self._outward, self._inward = PeerStreams(self._device, MAX_STREAMS), PeerStreams(self._device, MAX_STREAMS)
        self._local = new_stream(self._device)
        self._polling = new_stream(self._device, -1)
        self._warm_up()
        self.barrier()

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        return self._rendezvous.exchange(value, wanted)

    def is_mapped(self, rank: int) -> bool:
        return not self._force_put and self._calls.ptr(self._counters.data_ptr(), rank) != 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        needed = -(-max(1, *self.exchange(nbytes).values()) // HEAP_BYTES) * HEAP_BYTES
        remedy = "lower --staging-mib, or use --one-sided-buffers ring where it is direct"
        self._rendezvous.agree(library.attempt(lambda: library.check_room(needed, self.rank, remedy)))
        self._heap = self._symmetric(needed)
        library.opened(needed)
        return self._heap[:nbytes]

    def peer(self, rank: int) -> torch.Tensor:
        heap: torch.Tensor = self._core.get_peer_tensor(self._heap, rank)
        return heap

    def begin(self, has_new_copies: bool) -> None:
        self.enqueues = not has_new_copies
        for stream, _ in self._streams():
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, peer: int, put: Put, value: int) -> None:
        stream = self._outward.of(peer)
        with torch.cuda.stream(stream):
            put.batch.run()
        if put.packed is None:
            # A kernel's stores are visible to all once it has ended, and the signal follows it on the stream.
            self._signal(peer, Counter.ARRIVED, value, stream)
            return
        assert self._heap is not None
        # The signal is set after the data has arrived. The call is blocking: work after it on the stream may overwrite
        # `packed` (NVSHMEM documentation, signaling operations).
        self._calls.putmem_signal_on_stream(
            self._heap.data_ptr() + put.offset,
            put.packed.data_ptr(),
            put.packed.numel(),
            self._cell(Counter.ARRIVED, self.rank),
            value,
            self._set,
            peer,
            stream.cuda_stream,
        )

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._inward.of(peer)):
            batch.run()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._local):
            batch.run()

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        self._signal(peer, counter, value, self._stream(peer, counter, announces=True))

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        if self.enqueues:
            stream = self._stream(peer, counter, announces=False).cuda_stream
            self._calls.signal_wait_until_on_stream(self._cell(counter, peer), self._at_least, value, stream)
            return True
        number = self._number(counter, peer)
        if self._seen[number] < value:
            self._look()
        return self._seen[number] >= value

    def finish(self) -> None:
        """The one host synchronisation of a run."""
        streams = self._streams()
        late = wait_for_events([stream.record_event() for stream, _ in streams], self._timeout_s)
        if late:
            library.abandon()
            peers = [peer for index in late for peer in streams[index][1]]
            raise late_peers_error(self.rank, peers, self._timeout_s)

    def barrier(self) -> None:
        torch.cuda.synchronize(self._device)
        self.exchange(None)

    def close(self) -> None:
        if library.is_abandoned():
            return
        self.barrier()
        for tensor in (self._heap, self._counters):
            if tensor is not None:
                self._core.free_tensor(tensor)
        if self._heap is not None:
            library.closed()
        self._heap = None

    def _symmetric(self, nbytes: int) -> torch.Tensor:
        """Symmetric memory, uint8 `[nbytes]`, zeroed; `nbytes` is equal on all ranks. Collective."""
        made: list[torch.Tensor] = []
        self._rendezvous.agree(
            library.attempt(
                lambda: made.append(self._core.bytetensor((nbytes,), dtype=torch.uint8, except_on_del=False))
            )
        )
        return made[0].zero_()

    def _signal(self, peer: int, counter: Counter, value: int, stream: torch.cuda.Stream) -> None:
        self._calls.signal_op_on_stream(self._cell(counter, self.rank), value, self._set, peer, stream.cuda_stream)

    def _look(self) -> None:
        """Fetch all counters to the host."""
        with torch.cuda.stream(self._polling):
            self._host_counters.copy_(self._counters, non_blocking=True)
        self._polling.synchronize()
        self._seen = self._host_counters.view(torch.int64)[:: CELL_BYTES // 8].tolist()

    def _warm_up(self) -> None:
        """Load the kernel that only runs with waiting streams use."""
        cell, stream = self._cell(Counter.ARRIVED, self.rank), self._polling.cuda_stream
        self._calls.signal_wait_until_on_stream(cell, self._at_least, 0, stream)

    def _stream(self, peer: int, counter: Counter, announces: bool) -> torch.cuda.Stream:
        """The stream that announces or awaits `counter`: outward streams announce ARRIVED and await CREDIT."""
        outward = announces == (counter is Counter.ARRIVED)
        return (self._outward if outward else self._inward).of(peer)

    def _streams(self) -> list[tuple[torch.cuda.Stream, list[int]]]:
        """All streams of a run, each with its peers."""
        return [*self._outward.streams(), *self._inward.streams(), (self._local, [])]

    def _number(self, counter: Counter, about: int) -> int:
        return counter * len(self._rendezvous.members) + about

    def _cell(self, counter: Counter, about: int) -> int:
        """Symmetric address of the counter kept for rank `about`. Each has a cache line of its own."""
        return self._counters.data_ptr() + self._number(counter, about) * CELL_BYTES


class PeerStreams:
    """A stream for each peer. Where there are more than `limit` peers, they share streams."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._streams: list[torch.cuda.Stream] = []
        self._peers: dict[int, int] = {}

    def of(self, peer: int) -> torch.cuda.Stream:
        if peer not in self._peers:
            self._peers[peer] = len(self._peers) % self._limit
            if self._peers[peer] == len(self._streams):
                # A higher priority than local copies, for which no peer waits.
                self._streams.append(new_stream(self._device, -1))
                self._streams[-1].wait_stream(torch.cuda.current_stream(self._device))
        return self._streams[self._peers[peer]]

    def streams(self) -> list[tuple[torch.cuda.Stream, list[int]]]:
        """Each stream with its peers."""
        return [
            (stream, [peer for peer, index in self._peers.items() if index == number])
            for number, stream in enumerate(self._streams)
        ]
