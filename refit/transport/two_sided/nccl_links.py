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
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from refit.plan.cost import bytes_matrix, wire_only
from refit.plan.plan import RefitPlan
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
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


def peers_of(plan: RefitPlan, rank: int) -> tuple[list[int], list[int]]:
    """The ranks that `rank` sends to, and those it receives from, ascending."""
    wire = plan.is_wire
    targets = sorted(set(plan.destination[wire & (plan.source == rank)].tolist()))
    origins = sorted(set(plan.source[wire & (plan.destination == rank)].tolist()))
    return targets, origins


def connect_links(plan: RefitPlan, ranks: Ranks, device: torch.device, timeout_s: float) -> NcclLinks:
    """A communicator per pair where no rank has more than MAX_PARTNERS, else one of all ranks of the plan.

    Collective: every rank of the plan. Others may call. All connections of a rank are made at the same time.
    """
    partners = partners_of(plan)
    store = Rendezvous(ranks, f"nccl/{plan.digest}", plan.ranks, timeout_s).store
    if max((len(peers) for peers in partners.values()), default=0) > MAX_PARTNERS:
        return SharedLinks(plan, ranks.rank, store, device, timeout_s)
    return PairLinks(partners, ranks.rank, store, device, timeout_s)


class PairLinks:
    """A communicator for each pair that includes this rank.

    Rounds are started in the order of the pairs' ranks: the same order (round, pair) on every rank, so that work waits
    only for work that is earlier in it, even where all streams of a GPU share one hardware queue.
    """

    def __init__(
        self, partners: dict[int, list[int]], rank: int, store: Store, device: torch.device, timeout_s: float
    ) -> None:
        """`store` is for this use alone. Collective: every rank of `partners`. Other ranks may call."""
        pairs = {peer: sorted((rank, peer)) for peer in partners.get(rank, ())}
        self._pairs: dict[int, _Communicator] = {}
        for peer, (low, high) in sorted(pairs.items(), key=lambda item: item[1]):
            self._pairs[peer] = _Communicator((low, high), rank, PrefixStore(f"{low}-{high}", store), device, timeout_s)
        if self._pairs:
            # The lower rank of a pair publishes its id and the higher one waits for it, so this ends even though the
            # store's client serves one thread at a time.
            with ThreadPoolExecutor(len(self._pairs)) as threads:
                for connected in [threads.submit(pair.connect, [p], [p]) for p, pair in self._pairs.items()]:
                    connected.result()
        most = max((len(each) for each in partners.values()), default=0)
        self.text = f"one NCCL communicator per pair of ranks, at most {most} on a rank"

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[dist.Work]:
        works = []
        for peer, pair in self._pairs.items():
            outgoing = [bound for bound in sends if bound.peer == peer]
            incoming = [bound for bound in receives if bound.peer == peer]
            if outgoing or incoming:
                works.append(pair.exchange(outgoing, incoming))
        return works

    def close(self) -> None:
        for pair in self._pairs.values():
            pair.close()
        self._pairs.clear()


class SharedLinks:
    """One communicator of all ranks of a plan."""

    def __init__(self, plan: RefitPlan, rank: int, store: Store, device: torch.device, timeout_s: float) -> None:
        """`store` is for this use alone. Collective: every rank of the plan. Other ranks may call."""
        self._shared: _Communicator | None = None
        if rank in plan.ranks:
            self._shared = _Communicator(plan.ranks, rank, store, device, timeout_s)
            self._shared.create()
            self._shared.connect(*peers_of(plan, rank))
        self.text = f"one NCCL communicator of {len(plan.ranks)} ranks"

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> list[dist.Work]:
        if self._shared is None or not (sends or receives):
            return []
        return [self._shared.exchange(sends, receives)]

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None


class _Communicator:
    """A communicator of `members`, of which this rank is one. It belongs to no process group of torch's registry."""

    def __init__(self, members: Sequence[int], rank: int, store: Store, device: torch.device, timeout_s: float) -> None:
        self._device = device
        self._number = {member: number for number, member in enumerate(members)}
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=timeout_s)
        # torch's type hints lack the methods that it has from its base class.
        self._group: Any = dist.ProcessGroupNCCL(store, self._number[rank], len(members), options)

    def create(self) -> None:
        """Create the communicator, which the first operation does. Collective: every member, all at once."""
        self._group.allreduce([torch.zeros(1, device=self._device)]).wait()

    def connect(self, targets: Sequence[int], origins: Sequence[int]) -> None:
        """Send a byte to `targets` and receive one of `origins`: NCCL connects two ranks at their first message.

        Collective: every member. Between two, this also creates the communicator.
        """
        torch.cuda.set_device(self._device)
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        sends = [BoundMessage(target, byte, None) for target in targets]
        receives = [BoundMessage(origin, torch.empty_like(byte), None) for origin in origins]
        if sends or receives:
            self.exchange(sends, receives).wait()
        torch.cuda.synchronize(self._device)

    def exchange(self, sends: Sequence[BoundMessage], receives: Sequence[BoundMessage]) -> dist.Work:
        self._group._start_coalescing()
        for bound in receives:
            self._group.recv([bound.buffer], self._number[bound.peer], 0)
        for bound in sends:
            self._group.send([bound.buffer], self._number[bound.peer], 0)
        work: dist.Work = self._group._end_coalescing()
        return work

    def close(self) -> None:
        self._group.shutdown()
