"""Gloo: sends and receives between CPU memories, and between GPUs through pinned host memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from refit.copies.batch import CopyBatch
from refit.errors import RefitError, UnavailableError, first_line
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import TransportOptions
from refit.transport.two_sided.backend import BackendTraits, BoundMessage, P2PBackend, PendingRound, Streams
from refit.transport.two_sided.executor import TwoSidedProgram, prepare_program

TAG = 0x5EF1
"""Separates the messages of a refit from others that the default process group sends between two ranks."""


class GlooTransport:
    """Sends and receives over the default process group, from and into weights on CPUs or GPUs."""

    name = "gloo"

    def check_available(self) -> None:
        if not dist.is_gloo_available():
            raise UnavailableError("gloo needs a torch built with Gloo: install torch from its package index")

    def connect(self, plan: RefitPlan, options: TransportOptions) -> str | None:
        """Does nothing: the default process group is connected already."""
        return None

    def prepare(
        self, plan: RefitPlan, source: LocalWeights | None, destination: LocalWeights | None, options: TransportOptions
    ) -> TwoSidedProgram:
        """See `Transport.prepare`. Does not communicate."""
        memory = source if source is not None else destination
        return prepare_program(plan, _backend(memory, options), source, destination, options)


def _backend(memory: LocalWeights | None, options: TransportOptions) -> P2PBackend:
    if memory is not None and memory.device.type == "cuda":
        return PinnedGlooBackend(options.timeout_s, memory.device)
    return GlooBackend(options.timeout_s)


class GlooBackend:
    """Gloo over CPU memory. It sends only into posted receives, so it buffers nothing in between."""

    traits = BackendTraits(direct_send_threshold=256 << 10, bucket_bytes=4 << 20, slots_per_peer=4, window=64)

    def __init__(self, timeout_s: float) -> None:
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

    def _post(self, operation: object, bound: BoundMessage) -> dist.Work:
        assert callable(operation)
        try:
            work = operation(bound.buffer if bound.host is None else bound.host, bound.peer, tag=TAG)
        except RuntimeError as error:
            raise RefitError(f"rank {bound.peer} cannot be reached: {first_line(error)}") from error
        assert isinstance(work, dist.Work)
        return work

    def _wait(self, work: dist.Work, what: str, peer: int) -> None:
        start = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise RefitError(
                f"rank {peer} did not {what} rank {dist.get_rank()}: gave up after {time.monotonic() - start:.1f} s "
                f"(--timeout {self._timeout_s:g}): {first_line(error)}"
            ) from error


class PinnedGlooBackend(GlooBackend):
    """Gloo over CUDA memory: slots are packed on the device and copied to pinned host memory, in one copy each."""

    traits = BackendTraits(direct_send_threshold=None, bucket_bytes=32 << 20, slots_per_peer=2, window=2, copies=2)

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        super().__init__(timeout_s)
        self._streams = Streams(device)

    def begin(self) -> None:
        self._streams.begin()

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        with torch.cuda.stream(self._streams.pack):
            for bound in sends:
                if bound.batch is not None:
                    bound.batch.run()
                assert bound.host is not None
                bound.host.copy_(bound.buffer, non_blocking=True)
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
                bound.buffer.copy_(bound.host, non_blocking=True)
                if bound.batch is not None:
                    bound.batch.run()
            pending.unpacked = self._streams.unpack.record_event()

    def copy_local(self, batch: CopyBatch) -> None:
        with torch.cuda.stream(self._streams.local):
            batch.run()

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        self._streams.finish()
