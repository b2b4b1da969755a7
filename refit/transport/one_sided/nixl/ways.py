"""What really carries the bytes between two ranks over NIXL: found by writing a little, and judged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from refit.copies.batch import CopyBatch
from refit.plan.plan import RefitPlan
from refit.transport.base import Connected, TransportOptions
from refit.transport.one_sided.executor import Backoff
from refit.transport.one_sided.nixl.library import Agent
from refit.transport.one_sided.nixl.memory import NixlMemory, NixlPut
from refit.transport.one_sided.nixl.runs import descriptor
from refit.transport.one_sided.peer_memory import Counter
from refit.transport.rendezvous import Rendezvous

PROBE_BYTES = 64 << 10
"""Written to every peer: UCX chooses for all sizes at the first write."""

TIMED_BYTES = 4 << 20
"""Written to one peer where a way is slow, to say how slow."""

NEAR, FAR = "within a host", "between hosts"

Found = dict[str, str | None]
"""By where the peers are: what carries writes to them, None where it is unknown."""

FAST = {"cpu": ("cma", "xpmem", "knem", "posix", "sysv"), "cuda": ("cuda_ipc",)}
"""By where the weights are, what UCX calls transports that copy once between two processes of a host."""

ADAPTERS = Path("/sys/class/infiniband")

WHY = {
    "cpu": "the kernel does not let one process write another's memory, as with kernel.yama.ptrace_scope above "
    "0 or in containers of their own, or UCX_TLS leaves cma out",
    "cuda": "UCX does not open the other process's GPU memory, as that of PyTorch's expandable segments: leave "
    "them out of PYTORCH_CUDA_ALLOC_CONF, or use cuda-ipc",
    FAR: "this host has adapters for RDMA, which UCX does not use: see UCX_TLS and UCX_NET_DEVICES",
}


def find_ways(plan: RefitPlan, rendezvous: Rendezvous, agent: Agent, options: TransportOptions) -> Connected:
    """Let every source write to its destinations, and say what has carried it. Collective: every rank of the plan.

    Raises RefitError, naming the rank, where one is not reached.
    """
    probe = _Probe(plan, rendezvous, agent, options)
    found: Found = {}
    slow = None
    for where, peers in probe.targets().items():
        for peer in peers:
            probe.write(peer, PROBE_BYTES)
        agent.ways[where] = agent.new_ways() or agent.ways.get(where) or agent.ways.get(NEAR)
        found[where] = agent.ways[where]
        why = why_slow(where, found[where], options.device_type)
        if why is not None:
            slow = (
                f"NIXL writes {where} over {found[where]}: {probe.rate(peers[0]) / 1e9:.2f} GB/s from rank "
                f"{rendezvous.rank}, whose own memory is copied at {probe.copy_rate() / 1e9:.2f} ({why})"
            )
    probe.wait_for_sources()
    seen = list(rendezvous.exchange((found, slow)).values())
    probe.close()
    slows = [each for _, each in seen if each is not None]
    return Connected(_words(agent.backend, [ways for ways, _ in seen]), slows[0] if slows else None)


class _Probe:
    """A little memory on every rank, which the sources of the plan write into."""

    def __init__(self, plan: RefitPlan, rendezvous: Rendezvous, agent: Agent, options: TransportOptions) -> None:
        """Collective: every rank of the plan."""
        device = torch.device(options.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self._rendezvous = rendezvous
        self._timeout_s = options.timeout_s
        pairs = np.unique(np.stack([plan.source, plan.destination], axis=1)[plan.is_wire], axis=0)
        rank = rendezvous.rank
        self._targets = pairs[pairs[:, 0] == rank, 1].tolist()
        self._sources = pairs[pairs[:, 1] == rank, 0].tolist()
        self._memory = NixlMemory(rendezvous, agent, device, options.timeout_s)
        self._own = torch.zeros(TIMED_BYTES, dtype=torch.uint8, device=device)
        self._theirs = torch.zeros_like(self._own)
        registered = self._memory.register([self._own, self._theirs])
        self._device = registered.regions[0].device
        hello = self._memory.inbox, self._memory.offered(registered), (self._theirs.data_ptr(), self._device)
        found = rendezvous.exchange(hello, sorted({*self._targets, *self._sources}))
        self._places = {}
        for peer, (inbox, offered, place) in found.items():
            self._memory.meet(peer, inbox, offered)
            self._places[peer] = place

    def targets(self) -> dict[str, list[int]]:
        """This rank's destinations: within its host, between hosts; neither where there is none."""
        host_of, rank = self._rendezvous.ranks.host_of, self._rendezvous.rank
        near = [peer for peer in self._targets if host_of[peer] == host_of[rank]]
        far = [peer for peer in self._targets if host_of[peer] != host_of[rank]]
        return {where: peers for where, peers in ((NEAR, near), (FAR, far)) if peers}

    def write(self, peer: int, nbytes: int) -> None:
        memory, (address, device) = self._memory, self._places[peer]
        lists = (
            memory.listed(None, descriptor(self._own.data_ptr(), nbytes, self._device)),
            memory.listed(peer, descriptor(address, nbytes, device)),
        )
        write = memory.write(*lists, np.zeros(1, dtype=np.int32))
        memory.send(peer, NixlPut(CopyBatch(()), write=write), 1)
        memory.finish()

    def rate(self, peer: int) -> float:
        """Bytes per second of a large write to `peer`."""
        self.write(peer, TIMED_BYTES)
        start = time.perf_counter()
        self.write(peer, TIMED_BYTES)
        return TIMED_BYTES / (time.perf_counter() - start)

    def wait_for_sources(self) -> None:
        """Tell this rank's destinations that it has written all, and wait for its sources to say so.

        Until then it makes progress, which their writes may need. Raises RefitError, naming one, where a source does
        not say so within the timeout.
        """
        for target in self._targets:
            self._memory.raise_counter(target, Counter.CREDIT, 1)
        backoff = Backoff(self._timeout_s)
        for source in self._sources:
            while not self._memory.reached(source, Counter.CREDIT, 1):
                backoff.wait(self._memory.rank, source)

    def copy_rate(self) -> float:
        """Bytes per second of a copy within this rank's memory."""
        start = time.perf_counter()
        self._theirs.copy_(self._own)
        if self._own.is_cuda:
            torch.cuda.synchronize()
        return TIMED_BYTES / (time.perf_counter() - start)

    def close(self) -> None:
        self._memory.close()


def why_slow(where: str, way: str | None, device: str) -> str | None:
    """Why this way is slower than it need be; None where it is not, as far as is known."""
    if way is None:
        return None
    if where == NEAR:
        return None if any(name in way for name in FAST[device]) else WHY[device]
    with suppress(OSError):
        return WHY[FAR] if "tcp/" in way and any(ADAPTERS.iterdir()) else None
    return None


def _words(backend: str, seen: Sequence[Found]) -> str | None:
    """`UCX: cma/memory within a host, tcp/eth0 between hosts`; None where nothing is sent."""
    ways = {
        where: sorted({found[where] or "a transport that it does not state" for found in seen if where in found})
        for where in (NEAR, FAR)
    }
    stated = ", ".join(f"{' and '.join(names)} {where}" for where, names in ways.items() if names)
    return f"{backend}: {stated}" if stated else None
