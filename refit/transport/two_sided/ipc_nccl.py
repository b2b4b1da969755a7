"""cuda-ipc+nccl: one refit over both, CUDA IPC between GPUs of a host and NCCL between hosts (`rings`).

The executor is that of NCCL: its messages, its rounds, its relays. A message to a rank of the same host is copied
through a ring of chunks in that rank's GPU memory. The host waits for each copy, so that whoever is told of a chunk
finds it. It has run on no GPU yet; its rings and their order of rounds have, over shared memory and Gloo.

NCCL's work of round j is enqueued once all chunks of the rounds before it have been sent and received: its kernels wait
for peers on the GPU, where the copies of a ring may be behind them in one hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1), and where an encoding packs messages the host waits for their lengths.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from refit.errors import UnavailableError
from refit.memory.streams import new_stream
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, IdleProgram, Program, TransportOptions
from refit.transport.one_sided import cuda_peers
from refit.transport.one_sided.cuda_ipc import open_probes
from refit.transport.one_sided.ipc_memory import IpcHeap, here
from refit.transport.one_sided.shm import SharedMemoryTransport
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided.backend import PendingRound
from refit.transport.two_sided.executor import prepare_program
from refit.transport.two_sided.nccl import NcclBackend, NcclTransport
from refit.transport.two_sided.rings import MixedBackend, Rings, ranks_here

CHUNK_BYTES = 16 << 20
"""From here on a copy engine writes a peer's memory at nearly its full speed (`one_sided.cuda_ipc.ENGINE_BYTES`)."""

WITHIN, BETWEEN = "cuda-ipc", "nccl"
NAMES = ("cuda-ipc+nccl", "nccl")


class IpcNcclTransport(NcclTransport):
    """Moves weights on GPUs."""

    name = "cuda-ipc+nccl"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        if not torch.cuda.is_available():
            raise UnavailableError(f"{self.name} needs CUDA GPUs, this machine has none: use --refit-method shm+gloo")
        super().check_available(options)
        cuda_peers.check_available(options.ranks_per_gpu)
        SharedMemoryTransport().check_available(options)

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected:
        """As `NcclTransport.connect`, and open a piece of the memory of every peer on this host, as a test.

        Collective: every rank of the plan. Raises UnavailableError, the same on every rank, where that fails.
        """
        connected = super().connect(plan, ranks, options)
        if ranks.rank in plan.ranks:
            rendezvous = Rendezvous(ranks, f"{self.name}/{plan.digest}", plan.ranks, options.timeout_s)
            open_probes(rendezvous, [rank for rank in ranks_here(plan, ranks) if rank != ranks.rank])
        return connected

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Collective: every rank of the plan."""
        if ranks.rank not in plan.ranks:
            return IdleProgram()
        self.connect(plan, ranks, options)
        assert self._links is not None
        stream = new_stream(here(), -1)
        rings = _rings(plan, ranks, options, stream)
        far = NcclBackend(ranks.rank, options.timeout_s, here(), self._links)
        backend = IpcNcclBackend(far, rings, stream)
        options = replace(options, staging_bytes=options.staging_bytes - rings.nbytes)

        def release() -> None:
            rings.close()
            self._disconnect()

        return prepare_program(plan, ranks.rank, backend, source, destination, options, release, rings.nbytes)


def _rings(plan: RefitPlan, ranks: Ranks, options: TransportOptions, stream: torch.cuda.Stream) -> Rings:
    members = ranks_here(plan, ranks)
    of_flags, of_data = (
        Rendezvous(ranks, f"ipc-rings/{what}/{plan.digest}/{members[0]}", members, options.timeout_s)
        for what in ("flags", "data")
    )

    def copy(into: torch.Tensor, part: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            into.copy_(part, non_blocking=True)
        stream.synchronize()

    heap = IpcHeap(of_data, options.timeout_s)
    return Rings(of_flags, heap, copy, CHUNK_BYTES, options.timeout_s, NAMES, options.staging_bytes // 4)


class IpcNcclBackend(MixedBackend):
    """Orders the copies of rings, on `stream`, behind what NCCL's backend does with the same buffers."""

    def __init__(self, far: NcclBackend, rings: Rings, stream: torch.cuda.Stream) -> None:
        super().__init__(far, rings, WITHIN, BETWEEN, blocks=True)
        self._nccl, self._stream = far, stream

    def begin(self) -> None:
        super().begin()
        self._stream.wait_stream(torch.cuda.current_stream())  # which may still be writing the weights

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        self._stream.wait_stream(self._nccl.streams.pack)
        if reused is not None and reused.unpacked is not None:
            self._stream.wait_event(reused.unpacked)
        with torch.cuda.stream(self._nccl.streams.pack):  # where a message that has been packed has its length
            super().post(pending, reused)
