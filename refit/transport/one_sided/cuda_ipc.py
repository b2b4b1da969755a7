"""CUDA IPC as a substrate of the one-sided executor: sources write the weights of GPUs on the same host.

Weights stay where PyTorch has allocated them, in ordinary or expandable segments. A source opens the memory of its
destinations and copies into it: large contiguous runs by copy engine, all others in one kernel launch per destination,
at the same time. Counters are in POSIX shared memory, and only the host reads and writes them: a destination gives
credit when its weights may be overwritten, a source reports a message when its copies have ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from refit.copies.batch import CopyBatch, load_kernels
from refit.errors import RefitError, UnavailableError, UsageError, first_line
from refit.memory.streams import is_over, late_peers_error, new_stream
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import IdleProgram, Program, TransportOptions
from refit.transport.messages import Framing, bucket_bytes, even_framing
from refit.transport.one_sided import cuda_peers
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.in_place import InPlaceBuffers
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.one_sided.receive_buffers import RingBuffers
from refit.transport.one_sided.shm import SharedMemory
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.schedule import make_schedule
from refit.transport.turns import in_turn

WHOLE_CHANNEL = Framing(1 << 62, None)
"""One message per destination: nothing is staged that a bucket would have to hold."""

PIPELINED_BYTES = 256 << 20
"""Of a message where weights are made beside it. 256 Mi codes are 0.8 GB of memory traffic to quantise, some 0.3 ms of
an H200, which nothing hides before the first message; they take 0.7 ms to send. A message costs some 10 us."""

ENGINE_BYTES = 16 << 20
"""Contiguous runs from here on go by copy engine. On H200, into a peer: 16 MiB 362 GB/s, 28 MiB 373, 56 MiB 381,
256 MiB 389; the kernel 363 whatever the size; both at once 376."""

PUT_PROGRAMS = 132
"""Programs that write to a peer at the same time. Without a limit they would take the whole GPU, wait for the link in
all of it, and let local copies begin only after them."""

LOCAL_BATCH_BYTES = 4 << 30
"""In one launch: on H200, copy engines keep 365 of their 368 GB/s beside local copies at full speed."""

SLOTS_PER_PEER = 4
SLOT_BYTES = 64 << 20
"""Of messages that must be decoded."""

HEAP_BYTES = 512

DEVICE = 6
"""The index of the owner's device number among the arguments that rebuild a shared tensor."""


class CudaIpcTransport:
    name = "cuda-ipc"

    def check_available(self) -> None:
        cuda_peers.check_available()

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> str | None:
        """Load the copy kernel, and open a piece of every peer's memory as a test. Collective: every rank of the plan.

        Raises UnavailableError, the same on every rank, where that fails.
        """
        if ranks.rank not in plan.ranks:
            return None
        rendezvous = _rendezvous(plan, ranks, options)
        here = _here()
        probe = torch.full((1,), rendezvous.rank % 256, dtype=torch.uint8, device=here)
        torch.cuda.synchronize(here)
        peers = [rank for rank in rendezvous.members if rank != rendezvous.rank]
        handles: dict[int, Any] = {}
        rendezvous.agree(_attempt(lambda: handles.update(_handles(probe, peers))))
        offered = rendezvous.exchange(handles, peers)
        rendezvous.agree(_attempt(lambda: _check_probes({peer: offered[peer][rendezvous.rank] for peer in peers})))
        load_kernels(here)
        return None

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Collective: every rank of the plan.

        Raises UnavailableError where the ranks are on several hosts, UsageError where weights are on another device.
        """
        if ranks.rank not in plan.ranks:
            return IdleProgram()
        rendezvous = _rendezvous(plan, ranks, options)
        rendezvous.agree(_check_devices(source, destination))
        if options.max_bytes is not None:
            return _staged(plan, rendezvous, source, destination, options)
        memory = IpcMemory(rendezvous, options.timeout_s)
        # What is passed on, too, goes message by message.
        is_pipelined = options.is_pipelined or plan.num_stages > 1
        framing = even_framing(plan, PIPELINED_BYTES) if is_pipelined else WHOLE_CHANNEL
        schedule = in_turn(make_schedule(plan, rendezvous.rank, framing), plan)
        buffers = InPlaceBuffers(memory, schedule, destination, ENGINE_BYTES, PUT_PROGRAMS)
        return OneSidedProgram(schedule, memory, buffers, source, destination, options.timeout_s)


def _staged(
    plan: RefitPlan,
    rendezvous: Rendezvous,
    source: LocalWeights | None,
    destination: LocalWeights | None,
    options: TransportOptions,
) -> Program:
    """The program of messages that must be decoded: through rings, since they cannot be written in place.

    Collective: every rank of the plan.
    """
    slot_bytes = bucket_bytes(plan, options.staging_bytes, SLOTS_PER_PEER, SLOT_BYTES)
    framing = Framing(slot_bytes, None, max_bytes=options.max_bytes)
    schedule = in_turn(make_schedule(plan, rendezvous.rank, framing), plan)
    heap = IpcHeap(rendezvous, options.timeout_s)
    buffers = RingBuffers(destination, SLOTS_PER_PEER, slot_bytes)
    buffers.attach(heap, schedule)
    return OneSidedProgram(schedule, heap, buffers, source, destination, options.timeout_s)


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
        self._device = _here()
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
        return _handles(self._shared[-1], peers)

    def map(self, handles: Sequence[Any]) -> list[torch.Tensor]:
        return [_open(handle) for handle in handles]

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


def _here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _rendezvous(plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Rendezvous:
    return Rendezvous(ranks, f"cuda-ipc/{plan.digest}", plan.ranks, options.timeout_s)


def _alias(region: torch.Tensor) -> torch.Tensor:
    """The memory of `region` as a storage of its own, which does not own it.

    PyTorch ties a shared storage to its peers for as long as it lives. A model's storages must stay free of that. A
    storage that owned a Python object would need the interpreter to be freed, perhaps after its end.
    """
    address, nbytes = region.data_ptr(), region.numel()
    storage = torch._C._construct_storage_from_data_pointer(address, region.device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=region.device).set_(storage)


def _handles(shared: torch.Tensor, peers: Sequence[int]) -> dict[int, Any]:
    """Peer -> what rebuilds `shared` there. `shared` must live until all peers have closed it.

    PyTorch counts one user per handle and frees the memory when that one has closed it, so every peer gets its own.
    """
    return {peer: reduce_tensor(shared) for peer in peers}  # type: ignore[no-untyped-call]


def _open(handle: Any) -> torch.Tensor:
    """The region behind `handle`, mapped for this rank's GPU.

    Mapped for the owner's device number instead, kernels fault and copies run at 37 GB/s (H200).
    """
    rebuild, arguments = handle
    region: torch.Tensor = rebuild(*arguments[:DEVICE], torch.cuda.current_device(), *arguments[DEVICE + 1 :])
    return region


def _check_probes(handles: dict[int, Any]) -> None:
    for rank, handle in handles.items():
        found = int(_open(handle))
        if found != rank % 256:
            raise UnavailableError(f"cuda-ipc read {found} in the memory of rank {rank}, not {rank % 256}: use nccl")


def _attempt(action: Callable[[], None]) -> RefitError | None:
    """Run `action`. CUDA's errors are returned as an UnavailableError that can be sent to the other ranks."""
    try:
        action()
    except RefitError as error:
        return error
    except RuntimeError as error:
        return UnavailableError(
            f"cuda-ipc: ranks cannot open each other's GPU memory ({first_line(error)}): start all in one container, "
            "or use --refit-method nccl"
        )
    return None


def _check_devices(*memories: LocalWeights | None) -> UsageError | None:
    for memory in memories:
        if memory is not None and memory.device != _here():
            return UsageError(
                f"cuda-ipc moves weights on the current CUDA device, {_here()}, these are on {memory.device}: "
                "call torch.cuda.set_device first, or use shm or gloo for weights in CPU memory"
            )
    return None
