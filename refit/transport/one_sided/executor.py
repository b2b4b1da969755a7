"""The one-sided executor: sources write into memory of the destinations that both map, and raise signals.

For every pair two counters that only grow, over all runs: `ARRIVED` at the destination counts the messages written,
`CREDIT` at the source those it may write. Message n waits until GRANTED reaches n; the destination takes it once
ARRIVED reaches n. Counters never start again, so a run needs no barrier against the one before: a source that is a run
ahead finds no grant and waits.

On CUDA streams nothing is waited for on the host: the same calls, in the same order, enqueue waits, copies and signals.
That cannot deadlock even where all streams of a GPU share one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), which
executes in the order of enqueueing. Every rank enqueues in rounds: its puts of round k, then its takes of round k. A
take waits for a put of the same round; a put waits for a take of an earlier round (a window ago), or, where runs are
granted as a whole, for a grant enqueued before round 0. So all work of all ranks has one order, (run, round, puts
before takes), in which each part waits only for earlier ones: the earliest unfinished part can always go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from refit.copies.batch import CopyBatch, local_batches
from refit.errors import RefitError
from refit.models.weights import LocalWeights, generations
from refit.transport.base import RunReport
from refit.transport.messages import Channel, Schedule
from refit.transport.one_sided.receive_buffers import Put, ReceiveBuffers
from refit.transport.phases import PhaseClock


class Counter(IntEnum):
    """The counters each rank keeps for each of its peers."""

    ARRIVED = 0
    CREDIT = 1


class PeerMemory(Protocol):
    """Memory that other ranks can write: what a one-sided substrate must offer.

    One over CUDA streams enqueues in the order of the calls: `reached` then enqueues the wait and returns True, and
    only `finish` waits. `enqueues` says whether it does so in the run that `begin` has opened.
    """

    rank: int
    enqueues: bool
    local_batch_bytes: int

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        """See `Rendezvous.exchange`. Collective."""
        ...

    def is_mapped(self, rank: int) -> bool:
        """Whether this rank can write the heap of `rank` with copies of its own; else `send` takes parcels for it."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """This rank's heap, uint8 `[nbytes]`, zeroed. Collective; raises the same RefitError on all ranks."""
        ...

    def peer(self, rank: int) -> torch.Tensor:
        """The heap of `rank`, which is mapped, uint8, as this rank can write it."""
        ...

    def begin(self, bound_anew: bool) -> None:
        """Open a run. `bound_anew`: copies not run before will be."""
        ...

    def send(self, peer: int, put: Put, value: int) -> None:
        """Write a message into the heap of `peer`; once that is complete, its ARRIVED for this rank becomes `value`."""
        ...

    def take(self, peer: int, batch: CopyBatch) -> None:
        """Copy out of this rank's heap what `peer` has written; before any counter raised for it afterwards."""
        ...

    def copy_local(self, batch: CopyBatch) -> None: ...

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        """Set the counter that `peer` keeps for this rank to `value`, at least what it was."""
        ...

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        """Whether the counter this rank keeps for `peer` is at least `value`; what it announces is then readable."""
        ...

    def finish(self) -> None:
        """Wait for all that the run has enqueued. Raises RefitError, naming peers, where time runs out."""
        ...

    def barrier(self) -> None:
        """Collective."""
        ...

    def close(self) -> None:
        """Drop all mappings. Tensors into them must not be used afterwards. Collective."""
        ...


@dataclass(slots=True)
class _Flow:
    """One channel at one of its ends. `total` counts messages over all runs, `position` within this one."""

    channel: Channel
    peer: int
    total: int = 0
    position: int = 0

    @property
    def is_done(self) -> bool:
        return self.position == len(self.channel.messages)

    def advance(self) -> None:
        self.total += 1
        self.position += 1


@dataclass(slots=True)
class _Send(_Flow):
    puts: list[Put] = field(default_factory=list)


@dataclass(slots=True)
class _Receive(_Flow):
    takes: list[CopyBatch] = field(default_factory=list)


class OneSidedProgram:
    """A schedule bound to this rank's weights and its peers' memory. Made by a transport's `prepare`."""

    def __init__(
        self,
        framed: Schedule,
        memory: PeerMemory,
        buffers: ReceiveBuffers,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        timeout_s: float,
    ) -> None:
        """`buffers` has been attached. Collective."""
        self._schedule = framed
        self._memory = memory
        self._buffers = buffers
        self._source = source
        self._destination = destination
        self._timeout_s = timeout_s
        self._sends = [_Send(channel, channel.destination) for channel in framed.sends]
        self._receives = [_Receive(channel, channel.source) for channel in framed.receives]
        self._local: list[CopyBatch] = []
        self._has_run = False
        self._bind()
        memory.barrier()

    @property
    def staging_bytes(self) -> int:
        return self._buffers.staging_bytes

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            bound_anew = self._follow_weights()
            self._memory.begin(bound_anew)
            self._open_run()
            clock.lap("bind")
            local = self._move(clock)
            for batch in local:
                self._memory.copy_local(batch)
            clock.lap("local")
            self._memory.finish()
            clock.lap("wait")
        self._has_run = True
        return self._schedule.report(clock)

    def close(self) -> None:
        self._sends, self._receives, self._local = [], [], []
        self._buffers.release()
        self._memory.close()

    def _open_run(self) -> None:
        window = self._buffers.window
        for flow in (*self._sends, *self._receives):
            flow.position = 0
            if window is not None:
                # The first message of a run uses slot 0: skip the numbers of the slots that the run before left unused.
                flow.total = -(-flow.total // window) * window
        for receive in self._receives:
            if window is not None:
                self._give_credit(receive)
            else:
                # The destination's weights are overwritten from here on, and not before.
                self._memory.raise_counter(receive.peer, Counter.CREDIT, receive.total + len(receive.takes))

    def _move(self, clock: PhaseClock) -> list[CopyBatch]:
        """All messages of the run, with local copies in between; returns those that are left."""
        local = list(self._local)
        backoff = Backoff(self._timeout_s)
        while pending := [flow for flow in (*self._sends, *self._receives) if not flow.is_done]:
            moved = self._progress(clock)
            if local and (self._memory.enqueues or not moved):
                self._memory.copy_local(local.pop())
                moved = True
                clock.lap("local")
            if moved:
                backoff.renew()
            else:
                backoff.wait(self._memory.rank, pending[0].peer)
                clock.lap("wait")
        return local

    def _progress(self, clock: PhaseClock) -> bool:
        """At most one message of every channel, so that all advance alike; False where none was ready.

        Puts before takes: see the module's text.
        """
        moved = False
        for flow in self._sends:
            if not flow.is_done and self._memory.reached(flow.peer, Counter.CREDIT, flow.total + 1):
                self._memory.send(flow.peer, flow.puts[flow.position], flow.total + 1)
                flow.advance()
                clock.lap("put")
                moved = True
        for receive in self._receives:
            if not receive.is_done and self._memory.reached(receive.peer, Counter.ARRIVED, receive.total + 1):
                self._memory.take(receive.peer, receive.takes[receive.position])
                receive.advance()
                self._give_credit(receive)
                clock.lap("unpack")
                moved = True
        return moved

    def _give_credit(self, flow: _Flow) -> None:
        """A message taken out frees its slot for the one a whole window later."""
        if self._buffers.window is not None:
            self._memory.raise_counter(flow.peer, Counter.CREDIT, flow.total + self._buffers.window)

    def _follow_weights(self) -> bool:
        """True where copies were bound that have not run before."""
        self._buffers.follow()
        if self._bound_to != generations(self._source, self._destination):
            self._bind()
            return True
        return not self._has_run

    def _bind(self) -> None:
        self._bound_to = generations(self._source, self._destination)
        for flow in self._sends:
            assert self._source is not None
            flow.puts = self._buffers.puts(flow.channel, self._source)
        for receive in self._receives:
            receive.takes = self._buffers.takes(receive.channel)
        framed, batch_bytes = self._schedule, self._memory.local_batch_bytes
        self._local = local_batches(framed.local, framed.zeros, self._source, self._destination, batch_bytes)


class Backoff:
    """Waiting without progress: yield first, then sleep, and give up after `timeout_s`."""

    # With more ranks than cores a rank that keeps yielding may keep its core all the same (Linux's EEVDF scheduler),
    # so sleep soon: 100 yields made the ring half as fast as 10.
    NUM_YIELDS = 10
    SLEEP_S = 20e-6

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.renew()

    def renew(self) -> None:
        self._turns = 0
        self._since = 0.0

    def wait(self, rank: int, peer: int) -> None:
        """Raises RefitError, naming `peer`, when it is used up."""
        self._turns += 1
        if self._turns <= self.NUM_YIELDS:
            os.sched_yield()
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > self._timeout_s:
            raise RefitError(
                f"rank {rank} heard nothing from rank {peer} for {self._timeout_s:g} s (--timeout): "
                "that rank has failed, or is slower than that"
            )
        time.sleep(self.SLEEP_S)
