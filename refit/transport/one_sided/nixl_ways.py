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
from refit.transport.one_sided.nixl_library import Agent
from refit.transport.one_sided.nixl_memory import NixlMemory, NixlPut
from refit.transport.one_sided.peer_memory import Counter
from refit.transport.rendezvous import Rendezvous

PROBE_BYTES = 4 << 20
NEAR, FAR = "within a host", "between hosts"

Found = dict[str, tuple[str | None, float]]
"""By where the peers are: what carries writes to them, None where it is unknown, and the bytes per second seen."""

FAST = {(NEAR, "cpu"): ("cma", "xpmem", "knem", "posix", "sysv"), (NEAR, "cuda"): ("cuda_ipc",)}
"""What UCX calls a transport that copies once between two processes of a host."""

ADAPTERS = Path("/sys/class/infiniband")

WHY = {
    (NEAR, "cpu"): "the kernel does not let one process write another's memory, as with kernel.yama.ptrace_scope above "
    "0 or in containers of their own, or UCX_TLS leaves cma out",
    (NEAR, "cuda"): "UCX does not open the other process's GPU memory: cuda-ipc and nccl do",
    FAR: "this host has adapters for RDMA, which UCX does not use: see UCX_TLS and UCX_NET_DEVICES",
}


def find_ways(plan: RefitPlan, rendezvous: Rendezvous, agent: Agent, options: TransportOptions) -> Connected:
    """Let every source write to its destinations, and say what has carried it. Collective: every rank of the plan.

    Raises RefitError, naming the rank, where one is not reached.
    """
    probe = _Probe(plan, rendezvous, agent, options)
    found: Found = {}
    for where, peers in probe.targets().items():
        rate = probe.write(peers)
        agent.ways[where] = agent.new_ways() or agent.ways.get(where) or agent.ways.get(NEAR)
        found[where] = agent.ways[where], rate
    probe.wait_for_sources()
    seen = rendezvous.exchange(found)
    slow = _judged(found, options.device_type, rendezvous.rank, probe.copy_rate())
    slows = [each for each in rendezvous.exchange(slow).values() if each is not None]
    probe.close()
    return Connected(_words(agent.backend, list(seen.values())), slows[0] if slows else None)


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
        self._own = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
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

    def write(self, peers: Sequence[int]) -> float:
        """Write to each of `peers`, and to the first once more. Returns that one's bytes per second."""
        for peer in peers:
            self._write(peer, 1)
        start = time.perf_counter()
        self._write(peers[0], 2)
        return PROBE_BYTES / (time.perf_counter() - start)

    def _write(self, peer: int, value: int) -> None:
        memory, (address, device) = self._memory, self._places[peer]
        own = np.array([[self._own.data_ptr(), PROBE_BYTES, self._device]], dtype=np.uint64)
        theirs = np.array([[address, PROBE_BYTES, device]], dtype=np.uint64)
        write = memory.write(memory.listed(None, own), memory.listed(peer, theirs), np.zeros(1, dtype=np.int32))
        memory.send(peer, NixlPut(CopyBatch(()), write=write), value)
        memory.finish()

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
        return PROBE_BYTES / (time.perf_counter() - start)

    def close(self) -> None:
        self._memory.close()


def _judged(found: Found, device: str, rank: int, copy_rate: float) -> str | None:
    """Why a way is slower than it need be, in words; None where none is."""
    for where, (way, rate) in found.items():
        if way is None:
            continue
        fast = FAST.get((where, device), ())
        has_adapters = False
        with suppress(OSError):
            has_adapters = any(ADAPTERS.iterdir())
        is_slow = not any(name in way for name in fast) if where == NEAR else has_adapters and "tcp/" in way
        if is_slow:
            why = WHY[NEAR, device] if where == NEAR else WHY[FAR]
            return (
                f"NIXL writes {where} over {way}: {rate / 1e9:.2f} GB/s from rank {rank}, whose own memory is copied "
                f"at {copy_rate / 1e9:.2f} ({why})"
            )
    return None


def _words(backend: str, seen: Sequence[Found]) -> str | None:
    """`UCX: cma/memory within a host, tcp/eth0 between hosts`; None where nothing is sent."""
    ways = {
        where: sorted({found[where][0] or "a transport that it does not state" for found in seen if where in found})
        for where in (NEAR, FAR)
    }
    stated = ", ".join(f"{' and '.join(names)} {where}" for where, names in ways.items() if names)
    return f"{backend}: {stated}" if stated else None
