"""The one-sided executor: sources write into memory of the destinations that both map, and raise signals.

For every pair two counters that only grow, over all runs: `ARRIVED` at the destination counts the messages written,
`GRANTED` at the source those it may write. Message n waits until GRANTED reaches n; the destination takes it once
ARRIVED reaches n. Counters never start again, so a run needs no barrier against the one before: a source that is a run
ahead finds no grant and waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch

from refit.errors import RefitError
from refit.transport.base import RunReport
from refit.transport.copies import CopyBatch, local_batches
from refit.transport.landing import Landing
from refit.transport.memory import WeightMemory, generations
from refit.transport.phases import PhaseClock
from refit.transport.schedule import Channel, Schedule

LOCAL_BATCH_BYTES = 4 << 20


class Counter(IntEnum):
    """The counters each rank keeps for each of its peers."""

    ARRIVED = 0
    GRANTED = 1


class PeerMemory(Protocol):
    """Memory that other ranks can write: what a one-sided substrate must offer.

    A substrate over CUDA streams enqueues `put` and `raise_counter` in order, and `reached` then enqueues the wait and
    returns True.
    """

    rank: int

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        """See `Rendezvous.exchange`. Collective."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """This rank's heap, uint8 `[nbytes]`, zeroed. Collective; raises UnavailableError on all ranks alike."""
        ...

    def peer(self, rank: int) -> torch.Tensor:
        """The heap of `rank`, uint8, as this rank can write it."""
        ...

    def put(self, batch: CopyBatch) -> None:
        """Write into peers' heaps; complete before any counter raised afterwards."""
        ...

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        """Set the counter that `peer` keeps for this rank to `value`, more than it was."""
        ...

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        """Whether the counter this rank keeps for `peer` is at least `value`; what it announces is then readable."""
        ...

    def barrier(self) -> None:
        """Collective."""
        ...

    def close(self) -> None:
        """Drop all mappings. Tensors into them must not be used afterwards."""
        ...


@dataclass(slots=True)
class _Flow:
    """One channel at one of its ends. `total` counts messages over all runs, `position` within this one."""

    channel: Channel
    peer: int
    batches: list[CopyBatch]
    total: int = 0
    position: int = 0

    @property
    def is_done(self) -> bool:
        return self.position == len(self.batches)

    def advance(self) -> None:
        self.total += 1
        self.position += 1


class OneSidedProgram:
    """A schedule bound to this rank's weights and its peers' memory. Made by a transport's `prepare`."""

    def __init__(
        self,
        framed: Schedule,
        memory: PeerMemory,
        landing: Landing,
        source: WeightMemory | None,
        destination: WeightMemory | None,
        timeout_s: float,
    ) -> None:
        """`landing` has been attached. Collective."""
        self._schedule = framed
        self._memory = memory
        self._landing = landing
        self._source = source
        self._destination = destination
        self._timeout_s = timeout_s
        self._sends = [_Flow(channel, channel.destination, []) for channel in framed.sends]
        self._receives = [_Flow(channel, channel.source, []) for channel in framed.receives]
        self._local: list[CopyBatch] = []
        self._bind()
        for flow in self._receives:
            self._grant(flow)
        memory.barrier()

    @property
    def staging_bytes(self) -> int:
        return self._landing.staging_bytes

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            self._follow_weights()
            self._open_run()
            clock.lap("bind")
            local = list(self._local)
            patience = _Patience(self._timeout_s)
            while pending := [flow for flow in (*self._sends, *self._receives) if not flow.is_done]:
                if self._progress(clock):
                    patience.renew()
                elif local:
                    local.pop().run()
                    patience.renew()
                    clock.lap("local")
                else:
                    patience.spend(self._memory.rank, pending[0].peer)
                    clock.lap("wait")
            for batch in local:
                batch.run()
            clock.lap("local")
        return self._schedule.report(clock)

    def close(self) -> None:
        self._sends, self._receives, self._local = [], [], []
        self._landing.release()
        self._memory.close()

    def _open_run(self) -> None:
        for flow in (*self._sends, *self._receives):
            flow.position = 0
        if self._landing.window is None:
            # The destination's weights are overwritten from here on, and not before.
            for flow in self._receives:
                self._memory.raise_counter(flow.peer, Counter.GRANTED, flow.total + len(flow.batches))

    def _progress(self, clock: PhaseClock) -> bool:
        """At most one message of every channel, so that all advance alike; False where none was ready."""
        moved = False
        for flow in self._sends:
            if not flow.is_done and self._memory.reached(flow.peer, Counter.GRANTED, flow.total + 1):
                self._memory.put(flow.batches[flow.position])
                flow.advance()
                self._memory.raise_counter(flow.peer, Counter.ARRIVED, flow.total)
                clock.lap("put")
                moved = True
        for flow in self._receives:
            if not flow.is_done and self._memory.reached(flow.peer, Counter.ARRIVED, flow.total + 1):
                flow.batches[flow.position].run()
                flow.advance()
                self._grant(flow)
                clock.lap("unpack")
                moved = True
        return moved

    def _grant(self, flow: _Flow) -> None:
        """A message taken out frees its slot for the one a whole window later."""
        if self._landing.window is not None:
            self._memory.raise_counter(flow.peer, Counter.GRANTED, flow.total + self._landing.window)

    def _follow_weights(self) -> None:
        self._landing.follow()
        if self._bound_to != generations(self._source, self._destination):
            self._bind()

    def _bind(self) -> None:
        self._bound_to = generations(self._source, self._destination)
        for flow in self._sends:
            assert self._source is not None
            flow.batches = self._landing.puts(flow.channel, self._source)
        for flow in self._receives:
            flow.batches = self._landing.takes(flow.channel)
        framed = self._schedule
        self._local = local_batches(framed.local, framed.zeros, self._source, self._destination, LOCAL_BATCH_BYTES)


class _Patience:
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

    def spend(self, rank: int, peer: int) -> None:
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
