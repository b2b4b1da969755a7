"""What differs between Gloo and NCCL, and between CPU and CUDA weights, under the two-sided executor.

All three wires move the messages of one round at a time and never hold more than the executor's ring of slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from refit.copies.batch import CopyBatch
from refit.errors import RefitError
from refit.plan.plan import RefitPlan
from refit.transport.streams import is_over, new_stream

TAG = 0x5EF1
"""Keeps Gloo's messages apart from whatever else the default process group sends between two ranks."""


@dataclass(frozen=True, slots=True)
class BackendTraits:
    """How a wire wants its messages: pieces of `direct_send_threshold` travel alone, none exceeds `bucket_bytes`.

    `slots_per_peer` is how many staged messages of a pair are in flight, `window` how many rounds, most of whose
    messages may need no staging; `copies` is how many buffers one slot takes. `num_programs` bounds how much of a GPU
    packing and unpacking may take from the wire's own kernels.
    """

    direct_send_threshold: int | None
    bucket_bytes: int
    slots_per_peer: int
    window: int
    copies: int = 1
    num_programs: int | None = None


@dataclass(slots=True)
class Bound:
    """One message bound to this rank's memory.

    `buffer` (uint8, contiguous, on the weights' device) is what travels: the weights themselves, or a slot that `batch`
    packs or unpacks. `host` is the pinned copy of the slot where the wire cannot read the device. `reuses` is the round
    that had the slot before, -1 for none.
    """

    peer: int
    buffer: torch.Tensor
    batch: CopyBatch | None
    host: torch.Tensor | None = None
    reuses: int = -1


@dataclass(slots=True)
class PendingRound:
    """The messages of one round and what to wait for until they are done."""

    sends: Sequence[Bound]
    receives: Sequence[Bound]
    send_works: list[dist.Work] = field(default_factory=list)
    receive_works: list[dist.Work] = field(default_factory=list)
    unpacked: torch.cuda.Event | None = None


class P2PBackend(Protocol):
    """Steps of one round, in the order the executor calls them. `begin` and `finish` enclose a run.

    A wire over CUDA streams only enqueues; then `wait_*` orders streams and `finish` waits for the device.
    """

    traits: BackendTraits

    def begin(self) -> None: ...
    def wait_sent(self, pending: PendingRound) -> None: ...
    def pack(self, sends: Sequence[Bound]) -> None: ...
    def post(self, pending: PendingRound, reused: PendingRound | None) -> None: ...
    def wait_received(self, pending: PendingRound) -> None: ...
    def unpack(self, pending: PendingRound) -> None: ...
    def copy_local(self, batch: CopyBatch) -> None: ...
    def finish(self, rounds: Sequence[PendingRound]) -> None: ...


class GlooBackend:
    """Gloo over CPU memory. A send moves only once the receive is posted, so nothing is buffered in between."""

    traits = BackendTraits(direct_send_threshold=256 << 10, bucket_bytes=4 << 20, slots_per_peer=4, window=64)

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def begin(self) -> None:
        pass

    def wait_sent(self, pending: PendingRound) -> None:
        for work, bound in zip(pending.send_works, pending.sends, strict=True):
            self._wait(work, "take from", bound.peer)

    def pack(self, sends: Sequence[Bound]) -> None:
        for bound in sends:
            if bound.batch is not None:
                bound.batch.run()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        for bound in pending.receives:
            pending.receive_works.append(self._post(dist.irecv, bound))
        for bound in pending.sends:
            pending.send_works.append(self._post(dist.isend, bound))

    def wait_received(self, pending: PendingRound) -> None:
        for work, bound in zip(pending.receive_works, pending.receives, strict=True):
            self._wait(work, "send to", bound.peer)

    def unpack(self, pending: PendingRound) -> None:
        for bound in pending.receives:
            if bound.batch is not None:
                bound.batch.run()

    def copy_local(self, batch: CopyBatch) -> None:
        batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        pass

    def _post(self, operation: object, bound: Bound) -> dist.Work:
        assert callable(operation)
        try:
            work = operation(bound.buffer if bound.host is None else bound.host, bound.peer, tag=TAG)
        except RuntimeError as error:
            raise RefitError(f"rank {bound.peer} cannot be reached: {_first_line(error)}") from error
        assert isinstance(work, dist.Work)
        return work

    def _wait(self, work: dist.Work, what: str, peer: int) -> None:
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise RefitError(
                f"rank {peer} did not {what} rank {dist.get_rank()}: gave up after {time.monotonic() - start:.1f} s "
                f"(--timeout {self._timeout_s:g}): {_first_line(error)}"
            ) from error


class PinnedGlooBackend(GlooBackend):
    """Gloo over CUDA memory: buckets are packed on the device and cross to pinned host memory in one copy each."""

    traits = BackendTraits(direct_send_threshold=None, bucket_bytes=32 << 20, slots_per_peer=2, window=2, copies=2)

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        super().__init__(timeout_s)
        self._lanes = _Lanes(device)

    def begin(self) -> None:
        self._lanes.begin()

    def pack(self, sends: Sequence[Bound]) -> None:
        with torch.cuda.stream(self._lanes.pack):
            for bound in sends:
                if bound.batch is not None:
                    bound.batch.run()
                assert bound.host is not None
                bound.host.copy_(bound.buffer, non_blocking=True)
        # Gloo's thread reads host memory as soon as the send is posted.
        self._lanes.pack.synchronize()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        if reused is not None and reused.unpacked is not None:
            reused.unpacked.synchronize()
        super().post(pending, reused)

    def unpack(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self._lanes.unpack):
            for bound in pending.receives:
                assert bound.host is not None
                bound.buffer.copy_(bound.host, non_blocking=True)
                if bound.batch is not None:
                    bound.batch.run()
            pending.unpacked = self._lanes.unpack.record_event()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._lanes.local):
            batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        self._lanes.finish()


class NcclBackend:
    """NCCL: every round is one group of sends and receives, ordered by events; the host only enqueues.

    Round k of every rank holds message k of all its pairs, so groups meet in the same order everywhere. Packing round
    k + 1, moving round k and unpacking round k - 1 run on streams of their own.
    """

    # A message costs about 25 us beyond its bytes (0.5 MiB ones reach 20 GB/s of 338): few and large ones, packed. A
    # pair gets NCCL's channels divided by the communicator's ranks, 32 / 4 = 8, and more of them only where a message
    # would put over 16 MiB on each (NCCL 2.28, addP2pToPlan): on 4 H200 128 MiB travel at 262 GB/s, 256 MiB at 359.
    # 64 programs copy 1 TB/s, three times what a link takes, and leave NCCL's kernels room to start at once.
    traits = BackendTraits(
        direct_send_threshold=96 << 20, bucket_bytes=256 << 20, slots_per_peer=2, window=2, num_programs=64
    )

    def __init__(self, timeout_s: float, device: torch.device, group: dist.ProcessGroup) -> None:
        self._timeout_s = timeout_s
        self._group = group
        self._lanes = _Lanes(device)

    def begin(self) -> None:
        self._lanes.begin()

    def wait_sent(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self._lanes.pack):
            for work in pending.send_works:
                work.wait()

    def pack(self, sends: Sequence[Bound]) -> None:
        with torch.cuda.stream(self._lanes.pack):
            for bound in sends:
                if bound.batch is not None:
                    bound.batch.run()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        operations = [dist.P2POp(dist.irecv, bound.buffer, bound.peer, self._group) for bound in pending.receives]
        operations += [dist.P2POp(dist.isend, bound.buffer, bound.peer, self._group) for bound in pending.sends]
        if not operations:
            return
        self._lanes.backend.wait_stream(self._lanes.pack)
        if reused is not None and reused.unpacked is not None:
            self._lanes.backend.wait_event(reused.unpacked)
        with torch.cuda.stream(self._lanes.backend):
            works = dist.batch_isend_irecv(operations)
        # The group ends as a whole, so either side waits for all of it.
        pending.send_works = pending.receive_works = works

    def wait_received(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self._lanes.unpack):
            for work in pending.receive_works:
                work.wait()

    def unpack(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self._lanes.unpack):
            for bound in pending.receives:
                if bound.batch is not None:
                    bound.batch.run()
            pending.unpacked = self._lanes.unpack.record_event()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._lanes.local):
            batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        """The one host synchronisation of a run. Raises RefitError, naming the peers of the first unfinished round."""
        deadline = time.monotonic() + self._timeout_s
        for pending in rounds:
            while pending.unpacked is not None and not is_over(pending.unpacked):
                if time.monotonic() > deadline:
                    peers = sorted({bound.peer for bound in (*pending.sends, *pending.receives)})
                    raise RefitError(
                        f"rank {dist.get_rank()}: no end of the exchange with ranks {peers} within "
                        f"{self._timeout_s:g} s (--timeout): one of them has failed or is slower than that"
                    )
                time.sleep(0)
        self._lanes.finish()


def connect_nccl_pairs(plan: RefitPlan, group: dist.ProcessGroup, device: torch.device) -> None:
    """Send a byte along every pair of `plan` over NCCL, which connects two ranks when they first talk.

    Collective over `group`; ranks outside it return at once.
    """
    if dist.get_rank(group) < 0:
        return
    # The first operation of a group builds its communicator and needs all members at once.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    rank, backend = dist.get_rank(), plan.is_wire
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    targets = sorted(set(plan.destination[backend & (plan.source == rank)].tolist()))
    origins = sorted(set(plan.source[backend & (plan.destination == rank)].tolist()))
    operations = [dist.P2POp(dist.irecv, torch.empty_like(byte), origin, group) for origin in origins]
    operations += [dist.P2POp(dist.isend, byte, target, group) for target in targets]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    torch.cuda.synchronize(device)


class _Lanes:
    """One stream each for packing, the wire, unpacking and local copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pack, self.backend, self.unpack, self.local = (new_stream(device) for _ in range(4))

    def begin(self) -> None:
        """Start after all work that the caller's stream holds: it may still be writing the weights."""
        for lane in (self.pack, self.backend, self.unpack, self.local):
            lane.wait_stream(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        for lane in (self.pack, self.backend, self.unpack, self.local):
            torch.cuda.current_stream(self.device).wait_stream(lane)
        torch.cuda.current_stream(self.device).synchronize()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
