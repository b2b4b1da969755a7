"""shm+gloo: one refit over both, shared memory between ranks of a host and Gloo between hosts (`rings`).

The executor is that of Gloo: its messages, its rounds, its relays. A message to a rank of the same host goes through a
ring of chunks in that rank's shared memory, in place of the loopback network.
"""

from __future__ import annotations

import torch

from refit.config.registry import METHODS
from refit.errors import UsageError
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, IdleProgram, Program, TransportOptions
from refit.transport.one_sided.shm import SharedMemory, SharedMemoryTransport
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided.executor import prepare_program
from refit.transport.two_sided.gloo import GlooBackend, GlooTransport
from refit.transport.two_sided.rings import MixedBackend, Rings, ranks_here

CHUNK_BYTES = 512 << 10
"""Small enough that a ring stays in cache between the write and the read."""

WITHIN, BETWEEN = "shm", "gloo"


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
        rings = _rings(plan, ranks, options)
        backend = MixedBackend(GlooBackend(links, options.timeout_s), rings, WITHIN, BETWEEN)

        def release() -> None:
            rings.close()
            links.close()

        return prepare_program(plan, ranks.rank, backend, source, destination, options, release)


def _rings(plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Rings:
    here, names = ranks_here(plan, ranks), (SharedGlooTransport.name, "gloo")
    of_flags, of_data = (
        Rendezvous(ranks, f"rings/{what}/{plan.digest}/{here[0]}", here, options.timeout_s)
        for what in ("flags", "data")
    )
    return Rings(of_flags, SharedMemory(of_data, *names), _copy, CHUNK_BYTES, options.timeout_s, names)


def _copy(into: torch.Tensor, part: torch.Tensor) -> None:
    into.copy_(part)
