"""NIXL as a method: sources write the destination's weights, or rings, over what its backend finds between two ranks.

Within a host that is one copy by the kernel (CMA), between hosts RDMA where adapters are and TCP elsewhere. Nothing is
mapped, so it needs no shared file system, and one method serves ranks on one host and on several.
"""

from __future__ import annotations

import torch

from refit.errors import RefitError
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, IdleProgram, Program, TransportOptions
from refit.transport.messages import Framing, bucket_bytes
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.nixl import library as library
from refit.transport.one_sided.nixl.buffers import NixlBuffers
from refit.transport.one_sided.nixl.memory import NixlMemory
from refit.transport.one_sided.nixl.options import NixlOptions
from refit.transport.one_sided.nixl.ways import find_ways
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.schedule import make_schedule

SLOTS_PER_PEER = 4
SLOT_BYTES = 4 << 20
OWN_MESSAGE_BYTES = 256 << 10
"""Pieces from here on are messages of their own, so that a large one is written in place whatever lies beside it."""


class NixlTransport:
    name = "nixl"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        library.check_available(options.own_as(NixlOptions).backend)

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Connect the ranks of the plan, and find out what carries their writes. Collective: every rank of the plan.

        Raises RefitError, naming a rank, where two of them do not reach each other.
        """
        if ranks.rank not in plan.ranks:
            return None
        return find_ways(plan, _rendezvous(plan, ranks, options), _agent(options), options)

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
        device = next((side.device for side in (source, destination) if side is not None), torch.device("cpu"))
        rendezvous = _rendezvous(plan, ranks, options)
        # A rank has slots for what it sends, and others for what it receives.
        slot_bytes = bucket_bytes(plan, options.staging_bytes, 2 * SLOTS_PER_PEER, SLOT_BYTES)
        threshold = None if options.max_bytes is not None else min(OWN_MESSAGE_BYTES, slot_bytes)
        framing = Framing(slot_bytes, threshold, max_bytes=options.max_bytes)
        schedule = make_schedule(plan, ranks.rank, framing)
        memory = NixlMemory(rendezvous, _agent(options), device, options.timeout_s)
        is_staged = options.max_bytes is not None
        try:
            buffers = NixlBuffers(memory, schedule, source, destination, SLOTS_PER_PEER, is_staged=is_staged)
            return OneSidedProgram(buffers.schedule, memory, buffers, source, destination, options.timeout_s)
        except RefitError:
            memory.abandon()
            raise


def _agent(options: TransportOptions) -> library.Agent:
    return library.agent(options.own_as(NixlOptions).backend)


def _rendezvous(plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Rendezvous:
    return Rendezvous(ranks, f"nixl/{plan.digest}", plan.ranks, options.timeout_s)
