"""Gloo: sends and receives between CPU memories, and between GPUs through pinned host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from refit.copies.batch import CopyBatch
from refit.errors import RefitError, UnavailableError, first_line
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, IdleProgram, Program, TransportOptions
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.two_sided.backend import BackendTraits, BoundMessage, P2PBackend, PendingRound, Streams
from refit.transport.two_sided.executor import prepare_program


class GlooTransport:
    """Sends and receives over a Gloo group of a plan's ranks, from and into weights on CPUs or GPUs."""

    name = "gloo"

    def __init__(self) -> None:
        self._connected: dict[str, GlooLinks] = {}

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        if not dist.is_gloo_available():
            raise UnavailableError("gloo needs a torch built with Gloo: install torch from its package index")

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Connect the ranks of the plan, for the next program of it. Collective: every rank of the plan."""
        if ranks.rank in plan.ranks and plan.digest not in self._connected:
            self._connected[plan.digest] = GlooLinks(plan, ranks, options.timeout_s)
        return None

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
        links = self._connected.pop(plan.digest)
        memory = source if source is not None else destination
        backend = _backend(memory, links, options)
        return prepare_program(plan, ranks.rank, backend, source, destination, options, links.close)


def _backend(memory: LocalWeights | None, links: GlooLinks, options: TransportOptions) -> P2PBackend:
    if memory is not None and memory.device.type == "cuda":
        return PinnedGlooBackend(links, options.timeout_s, memory.device)
    return GlooBackend(links, options.timeout_s)


class GlooLinks:
    """A Gloo group of the ranks of a plan. It belongs to no process group of torch's registry."""

    def __init__(self, plan: RefitPlan, ranks: Ranks, timeout_s: float) -> None:
        """Collective: every rank of the plan. Raises RefitError where a rank does not come, or cannot be reached."""
        self.rank = ranks.rank
        self._number = {rank: number for number, rank in enumerate(plan.ranks)}
        rendezvous = Rendezvous(ranks, f"gloo/{plan.digest}", plan.ranks, timeout_s)
        rendezvous.exchange(None)  # names a rank that does not come, as Gloo does not
        number, timeout = self._number[ranks.rank], timedelta(seconds=timeout_s)
        try:
            # torch's type hints lack the methods that it has from its base class.
            self._group: Any = dist.ProcessGroupGloo(rendezvous.store, number, len(self._number), timeout)
        except RuntimeError as error:
            raise RefitError(f"rank {ranks.rank} cannot reach the others over Gloo: {first_line(error)}") from error

    def send(self, buffer: torch.Tensor, peer: int) -> dist.Work:
        return self._started(self._group.send, buffer, peer)

    def receive(self, buffer: torch.Tensor, peer: int) -> dist.Work:
        return self._started(self._group.recv, buffer, peer)

    def close(self) -> None:
        self._group = None

    def _started(self, operation: Callable[..., dist.Work], buffer: torch.Tensor, peer: int) -> dist.Work:
        try:
            return operation([buffer], self._number[peer], 0)
        except RuntimeError as error:
            raise RefitError(f"rank {peer} cannot be reached: {first_line(error)}") from error


class GlooBackend:
    """Gloo over CPU memory. It sends only into posted receives, so it buffers nothing in between."""

    traits = BackendTraits(direct_send_threshold=256 << 10, bucket_bytes=4 << 20, slots_per_peer=4, window=64)

    def __init__(self, links: GlooLinks, timeout_s: float) -> None:
        self._links = links
        self._timeout_s = timeout_s

    def begin(self) -> None:
        pass

    def wait_sent(self, pending: PendingRound) -> None:
        for work, bound in zip(pending.send_works, pending.sends, strict=True):
            self._wait(work, "take from", bound.peer)

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        for bound in sends:
            if bound.batch is not None:
                bound.batch.run()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        for bound in pending.receives:
            pending.receive_works.append(self._links.receive(_message(bound), bound.peer))
        for bound in pending.sends:
            # A message may be shorter than the buffer that its receiver has posted: Gloo leaves the rest as it is.
            pending.send_works.append(self._links.send(_message(bound)[: bound.filled_bytes], bound.peer))

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

    def _wait(self, work: dist.Work, what: str, peer: int) -> None:
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise RefitError(
                f"rank {peer} did not {what} rank {self._links.rank}: gave up after {time.monotonic() - start:.1f} s "
                f"(--timeout {self._timeout_s:g}): {first_line(error)}"
            ) from error


def _message(bound: BoundMessage) -> torch.Tensor:
    return bound.buffer if bound.host is None else bound.host


class PinnedGlooBackend(GlooBackend):
    """Gloo over CUDA memory: slots are packed on the device and copied to pinned host memory, in one copy each."""

    # Packing costs launches for each message, whatever its bytes, and a packed one crosses with those that changed.
    traits = BackendTraits(
        direct_send_threshold=None,
        bucket_bytes=32 << 20,
        slots_per_peer=2,
        window=2,
        copies=2,
        packed_bytes=128 << 20,
    )

    def __init__(self, links: GlooLinks, timeout_s: float, device: torch.device) -> None:
        super().__init__(links, timeout_s)
        self._streams = Streams(device)

    def begin(self) -> None:
        self._streams.begin()

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        with torch.cuda.stream(self._streams.pack):
            for bound in sends:
                if bound.batch is not None:
                    bound.batch.run()
                assert bound.host is not None
                nbytes = bound.filled_bytes
                bound.host[:nbytes].copy_(bound.buffer[:nbytes], non_blocking=True)
        # Gloo's thread reads host memory as soon as the send is posted.
        self._streams.pack.synchronize()

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        if reused is not None and reused.unpacked is not None:
            reused.unpacked.synchronize()
        super().post(pending, reused)

    def unpack(self, pending: PendingRound) -> None:
        with torch.cuda.stream(self._streams.unpack):
            for bound in pending.receives:
                assert bound.host is not None
                nbytes = bound.arrived_bytes
                bound.buffer[:nbytes].copy_(bound.host[:nbytes], non_blocking=True)
                if bound.batch is not None:
                    bound.batch.run()
            pending.unpacked = self._streams.unpack.record_event()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._streams.local):
            batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        self._streams.finish()
