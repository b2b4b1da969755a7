"""NVSHMEM as a substrate of the one-sided executor: sources write GPU memory of destinations."""

from __future__ import annotations

import torch

from refit.copies.batch import load_kernels
from refit.errors import UsageError
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, Program, TransportOptions
from refit.transport.messages import Framing, bucket_bytes
from refit.transport.one_sided import nvshmem_library as library
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.nvshmem_memory import NvshmemMemory
from refit.transport.one_sided.options import NvshmemOptions
from refit.transport.one_sided.receive_buffers import DirectBuffers, RingBuffers
from refit.transport.ranks import Ranks, check_own_gpus
from refit.transport.rendezvous import Rendezvous
from refit.transport.schedule import make_schedule

SLOTS_PER_PEER = 2
"""Two suffice: unpacking one slot takes a fraction of the time of writing the next one over NVLink."""

SLOT_BYTES = 64 << 20
"""Large, because each message costs the host some tens of microseconds. 64 MiB take 180 us at 365 GB/s."""

SLOT_ALIGNMENT = 512
DIRECT_BATCH_BYTES = 256 << 20

PUT_PROGRAMS = 512
"""Programs that write to peers at the same time: enough to fill NVLink, and half of what fits on an H100. Those that
wait for the link thus leave room for programs that unpack and copy locally."""

MIN_PUT_PROGRAMS = 64


SHARED = "without MPS, NVSHMEM's processes on one GPU cannot wait for each other's signals"
"""NVSHMEM's installation guide, "Using NVSHMEM with Multiple Processes-Per-GPU": point-to-point synchronisation, which
carries our messages, needs MPS and shares of the GPU that add up to one."""


class NvshmemTransport:
    name = "nvshmem"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        check_own_gpus(self.name, options.ranks_per_gpu, SHARED)
        library.check_available()

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Initialise the library and load the copy kernel. Collective: every one of `ranks`."""
        rendezvous = _rendezvous(plan, ranks, options)
        rendezvous.agree(library.attempt(self.check_available))
        library.start(rendezvous, _heap_bound(plan, options))
        load_kernels(torch.device("cuda", torch.cuda.current_device()))
        return None

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Raises UsageError where symmetric memory does not fit, or direct buffers cannot be
        mapped.

        Collective, as is the program's `close`: every one of `ranks`, because all of them allocate
        symmetric memory.
        """
        self.connect(plan, ranks, options)
        rendezvous = _rendezvous(plan, ranks, options)
        rendezvous.agree(library.attempt(lambda: _check_inputs(source, destination, options)))
        memory = NvshmemMemory(rendezvous, options)
        try:
            buffers, framing = _buffers(plan, memory, destination, options)
        except UsageError:  # on all ranks
            memory.close()
            raise
        schedule = make_schedule(plan, rendezvous.rank, framing)
        buffers.attach(memory, schedule)
        if _writes_in_place(options):
            # The weights' former memory is in PyTorch's caching allocator, which the heap cannot use.
            torch.cuda.empty_cache()
        return OneSidedProgram(schedule, memory, buffers, source, destination, options.timeout_s)


def _check_inputs(source: LocalWeights | None, destination: LocalWeights | None, options: TransportOptions) -> None:
    here = torch.device("cuda", torch.cuda.current_device())
    for memory in (source, destination):
        if memory is not None and memory.device != here:
            raise UsageError(
                f"nvshmem moves weights on the current CUDA device, {here}, these are on {memory.device}: "
                "call torch.cuda.set_device first, or use shm or gloo for weights in CPU memory"
            )
    _writes_in_place(options)


def _writes_in_place(options: TransportOptions) -> bool:
    return options.own_as(NvshmemOptions).writes_in_place(options.max_bytes)


def _rendezvous(plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Rendezvous:
    return Rendezvous(ranks, f"nvshmem/{plan.digest}", range(ranks.size), options.timeout_s)


def _heap_bound(plan: RefitPlan, options: TransportOptions) -> int:
    """The most bytes of symmetric memory that any rank can need. Allocations have the same size on all ranks."""
    if _writes_in_place(options):
        return max(plan.destination_sharding.bytes_per_rank.values())
    return options.staging_bytes


def _buffers(
    plan: RefitPlan, memory: NvshmemMemory, destination: LocalWeights | None, options: TransportOptions
) -> tuple[RingBuffers | DirectBuffers, Framing]:
    """Collective. All ranks get the same framing."""
    targets = sorted(set(plan.destination[plan.is_wire & (plan.source == memory.rank)].tolist()))
    found = memory.exchange([target for target in targets if not memory.is_mapped(target)])
    unmapped = {rank: peers for rank, peers in found.items() if peers}
    programs = max(MIN_PUT_PROGRAMS, PUT_PROGRAMS // max(1, len(targets)))
    if _writes_in_place(options):
        for rank, peers in unmapped.items():
            reason = (
                "--nvshmem-force-put is given" if options.own_as(NvshmemOptions).force_put else "they share no NVLink"
            )
            raise UsageError(
                f"direct buffers are written through mapped memory, and rank {rank} does not map that of rank "
                f"{peers[0]} ({reason}): use --one-sided-buffers ring"
            )
        return DirectBuffers(destination, programs), Framing(DIRECT_BATCH_BYTES, None)
    # The slot in which messages for an unmapped peer are packed is staging too.
    slots_per_peer = SLOTS_PER_PEER + 1 if unmapped else SLOTS_PER_PEER
    slot_bytes = bucket_bytes(plan, options.staging_bytes, slots_per_peer, SLOT_BYTES)
    slot_bytes = slot_bytes // SLOT_ALIGNMENT * SLOT_ALIGNMENT or slot_bytes
    framing = Framing(slot_bytes, None, max_bytes=options.max_bytes)
    return RingBuffers(destination, SLOTS_PER_PEER, slot_bytes, programs), framing
