"""NCCL communicators: one for all ranks of a plan, or one for each of its pairs of ranks.

NCCL divides its channels by the ranks of a communicator. On four H200, messages of 64 MiB between two ranks reach 255
GB/s in a communicator of four, and 330 in one of the pair alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from refit.plan.cost import bytes_matrix, wire_only
from refit.plan.plan import RefitPlan
from refit.transport.two_sided.backend import BoundMessage

MAX_PARTNERS = 3
"""Ranks with more partners share one communicator. Each takes up to 32 multiprocessors while it sends, and the kernels
of all must run at once: three leave a quarter of an H100 to packing and unpacking. Each also takes some 600 MiB."""


class NcclLinks(Protocol):
    """Connections of this rank to its partners. `text` says what they are."""

    text: str

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[dist.Work]:
        """Start sends and receives on the current stream. All ranks must call for their rounds in the same order."""
        ...

    def close(self) -> None:
        """Destroy the communicators. Collective: every rank of the plan."""
        ...


def partners_of(plan: RefitPlan) -> dict[int, list[int]]:
    """The ranks with which each rank exchanges messages, ascending."""
    wire = wire_only(bytes_matrix(plan))
    linked = (wire + wire.T) > 0
    return {rank: [int(peer) for peer in linked[rank].nonzero()[0]] for rank in plan.ranks}


def connect_links(plan: RefitPlan, device: torch.device, timeout_s: float) -> NcclLinks:
    """A communicator per pair where no rank has more than MAX_PARTNERS, else one of all ranks.

    Collective: every rank of the default process group. All connections of a rank are made at the same time.
    """
    partners = partners_of(plan)
    if max((len(peers) for peers in partners.values()), default=0) > MAX_PARTNERS:
        return SharedLinks(plan, device)
    return PairLinks(partners, device, timeout_s)


class PairLinks:
    """A communicator for each pair that includes this rank.

    Rounds are started in the order of the pairs' ranks: the same order (round, pair) on every rank, so that work waits
    only for work that is earlier in it, even where all streams of a GPU share one hardware queue.
    """

    _num_uses = 0

    def __init__(self, partners: dict[int, list[int]], device: torch.device, timeout_s: float) -> None:
        """Collective: every rank of `partners`. Other ranks may call."""
        rank = dist.get_rank()
        # Every rank of the job connects equally often, so that numbers keep the keys of uses apart.
        PairLinks._num_uses += 1
        store = PrefixStore(f"refit/nccl-pairs/{PairLinks._num_uses}", _get_default_store())
        peers = sorted(partners.get(rank, ()), key=lambda peer: (min(rank, peer), max(rank, peer)))
        self._pairs = {peer: _Pair(store, rank, peer, device, timeout_s) for peer in peers}
        if self._pairs:
            # The lower rank of a pair publishes its id and the higher one waits for it, so this ends even though the
            # store's client serves one thread at a time.
            with ThreadPoolExecutor(len(self._pairs)) as threads:
                for connected in [threads.submit(pair.connect) for pair in self._pairs.values()]:
                    connected.result()
        most = max((len(each) for each in partners.values()), default=0)
        self.text = f"one NCCL communicator per pair of ranks, at most {most} on a rank"

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[dist.Work]:
        works = []
        for peer, pair in self._pairs.items():
            outgoing = [bound.buffer for bound in sends if bound.peer == peer]
            incoming = [bound.buffer for bound in receives if bound.peer == peer]
            if outgoing or incoming:
                works.append(pair.exchange(outgoing, incoming))
        return works

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()
        self._pairs.clear()


class _Pair:
    """The communicator of this rank and `peer`. It belongs to no process group of torch's registry."""

    def __init__(self, store: Store, rank: int, peer: int, device: torch.device, timeout_s: float) -> None:
        self._device = device
        self._other = int(rank < peer)
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=timeout_s)
        own = PrefixStore(f"{min(rank, peer)}-{max(rank, peer)}", store)
        # torch's type hints lack the methods that it has from its base class.
        self._group: Any = dist.ProcessGroupNCCL(own, 1 - self._other, 2, options)

    def connect(self) -> None:
        """Exchange a byte: NCCL connects at the first message. Collective: both ranks."""
        torch.cuda.set_device(self._device)
        outgoing, incoming = torch.zeros(2, 1, dtype=torch.uint8, device=self._device)
        self.exchange([outgoing], [incoming]).wait()
        torch.cuda.synchronize(self._device)

    def exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> dist.Work:
        self._group._start_coalescing()
        for buffer in incoming:
            self._group.recv([buffer], self._other, 0)
        for buffer in outgoing:
            self._group.send([buffer], self._other, 0)
        work: dist.Work = self._group._end_coalescing()
        return work

    def close(self) -> None:
        self._group.shutdown()


class SharedLinks:
    """One communicator of all ranks of a plan."""

    def __init__(self, plan: RefitPlan, device: torch.device) -> None:
        """Collective: every rank of the default process group."""
        urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        self._is_member = dist.get_rank() in plan.ranks
        self._group = dist.new_group(list(plan.ranks), backend="nccl", pg_options=urgent)
        connect_nccl_pairs(plan, self._group, device)
        self.text = f"one NCCL communicator of {len(plan.ranks)} ranks"

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[dist.Work]:
        operations = [dist.P2POp(dist.irecv, bound.buffer, bound.peer, self._group) for bound in receives]
        operations += [dist.P2POp(dist.isend, bound.buffer, bound.peer, self._group) for bound in sends]
        return list(dist.batch_isend_irecv(operations)) if operations else []

    def close(self) -> None:
        if self._is_member:
            dist.destroy_process_group(self._group)


def connect_nccl_pairs(plan: RefitPlan, group: dist.ProcessGroup, device: torch.device) -> None:
    """Send one byte between every pair of `plan`, because NCCL connects two ranks at their first message.

    Collective: every rank of `group`. Ranks outside it return at once.
    """
    if dist.get_rank(group) < 0:
        return
    # The first operation of a group creates its communicator and needs all members at once.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    rank, wire = dist.get_rank(), plan.is_wire
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    targets = sorted(set(plan.destination[wire & (plan.source == rank)].tolist()))
    origins = sorted(set(plan.source[wire & (plan.destination == rank)].tolist()))
    operations = [dist.P2POp(dist.irecv, torch.empty_like(byte), origin, group) for origin in origins]
    operations += [dist.P2POp(dist.isend, byte, target, group) for target in targets]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    torch.cuda.synchronize(device)
