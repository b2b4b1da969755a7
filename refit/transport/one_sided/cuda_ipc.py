"""CUDA IPC as a substrate of the one-sided executor: sources write the weights of GPUs on the same host, or of other
ranks of their own GPU.

Weights stay where PyTorch has allocated them, in ordinary or expandable segments. A source opens the memory of its
destinations and copies into it: large contiguous runs by copy engine, all others in one kernel launch per destination,
at the same time. Counters are in POSIX shared memory, and only the host reads and writes them: a destination gives
credit when its weights may be overwritten, a source reports a message when its copies have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refit.copies.batch import load_kernels
from refit.errors import RefitError, UnavailableError, UsageError, first_line
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, IdleProgram, Program, TransportOptions
from refit.transport.messages import Framing, bucket_bytes, even_framing
from refit.transport.one_sided import cuda_peers
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.in_place import InPlaceBuffers
from refit.transport.one_sided.ipc_memory import IpcHeap, IpcMemory, handles_of, here, open_region
from refit.transport.one_sided.receive_buffers import RingBuffers
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

SLOTS_PER_PEER = 4
SLOT_BYTES = 64 << 20
"""Of messages that must be decoded."""


class CudaIpcTransport:
    name = "cuda-ipc"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        cuda_peers.check_available(options.ranks_per_gpu)

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Load the copy kernel, and open a piece of every peer's memory as a test. Collective: every rank of the plan.

        Raises UnavailableError, the same on every rank, where that fails.
        """
        if ranks.rank not in plan.ranks:
            return None
        rendezvous = _rendezvous(plan, ranks, options)
        open_probes(rendezvous, [rank for rank in rendezvous.members if rank != rendezvous.rank])
        load_kernels(here())
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
        buffers = InPlaceBuffers(memory, schedule, destination, ENGINE_BYTES, PUT_PROGRAMS, _near(rendezvous))
        return OneSidedProgram(schedule, memory, buffers, source, destination, options.timeout_s)


def open_probes(rendezvous: Rendezvous, peers: list[int]) -> None:
    """Open a piece of the memory of each of `peers`, which do so too. Collective: every rank of the rendezvous.

    Raises UnavailableError, the same on every rank, where any of them cannot.
    """
    probe = torch.full((1,), rendezvous.rank % 256, dtype=torch.uint8, device=here())
    torch.cuda.synchronize(here())
    handles: dict[int, Any] = {}
    rendezvous.agree(_attempt(lambda: handles.update(handles_of(probe, peers))))
    offered = rendezvous.exchange(handles, peers)
    rendezvous.agree(_attempt(lambda: _check_probes({peer: offered[peer][rendezvous.rank] for peer in peers})))


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


def _rendezvous(plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Rendezvous:
    return Rendezvous(ranks, f"cuda-ipc/{plan.digest}", plan.ranks, options.timeout_s)


def _near(rendezvous: Rendezvous) -> set[int]:
    """The ranks whose GPU is this rank's. Collective: every rank of the plan."""
    of_rank = rendezvous.exchange(str(torch.cuda.get_device_properties(here()).uuid))
    return {rank for rank, gpu in of_rank.items() if gpu == of_rank[rendezvous.rank]}


def _check_probes(handles: dict[int, Any]) -> None:
    for rank, handle in handles.items():
        found = int(open_region(handle))
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
        if memory is not None and memory.device != here():
            return UsageError(
                f"cuda-ipc moves weights on the current CUDA device, {here()}, these are on {memory.device}: "
                "call torch.cuda.set_device first, or use shm or gloo for weights in CPU memory"
            )
    return None
