"""The one-sided executor: sources write into memory of the destinations and raise counters there.

Flow control is credit-based. Every pair has two counters that only grow, over all runs: ARRIVED at the destination
counts the messages written, CREDIT at the source counts the messages it may write. The source writes message n once
CREDIT reaches n; the destination unpacks it once ARRIVED reaches n. Because counters are never reset, runs need no
barrier between them: a source that is a run ahead lacks credit and waits.

On CUDA streams the host does not wait: the same calls, in the same order, enqueue waits, copies and signals. This
cannot deadlock, even where all streams of a GPU share one hardware queue that executes in the order of enqueueing
(CUDA_DEVICE_MAX_CONNECTIONS=1). Every rank enqueues step by step of the schedule: first its puts of step k, then its
unpacking of step k. Unpacking waits for a put of the same step. A put waits for unpacking of an earlier step: a window
ago, or, where it passes something on, of what brought it, also by local copies, which are enqueued before all and wait
for nothing. With direct buffers it waits for credit enqueued before step 0. So the order (run, step, puts before
unpacking) is the same for all ranks, and work waits only for work that is earlier in it: the earliest unfinished work
can always proceed.

Where the host waits, it polls all channels, and moves a message as soon as nothing stands in its way, whatever its
step: a slow pair holds up no other. What a message waits for is the same, so of all messages that are not done one with
the smallest (run, step) can go, and polling finds it. What an encoding has packed and is passed on is unpacked when
what goes on before it has gone (`kept`, which has the argument).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from refit.copies.batch import CopyBatch, local_batches
from refit.errors import RefitError
from refit.memory.phases import PhaseClock
from refit.memory.weights import LocalWeights
from refit.transport.base import RunReport
from refit.transport.local_sides import LocalSides
from refit.transport.messages import Channel, Message, Schedule
from refit.transport.one_sided.peer_memory import Counter, PeerMemory, Put
from refit.transport.one_sided.receive_buffers import ReceiveBuffers
from refit.transport.packing import bind_kept, run_report


@dataclass(slots=True)
class _Flow:
    """One channel at one of its ends. `total` counts its messages over all runs, `position` in this run."""

    channel: Channel
    peer: int
    total: int = 0
    position: int = 0

    @property
    def is_done(self) -> bool:
        return self.position == len(self.channel.messages)

    @property
    def message(self) -> Message:
        """The next one."""
        return self.channel.messages[self.position]

    def advance(self) -> None:
        self.total += 1
        self.position += 1


@dataclass(slots=True)
class _Send(_Flow):
    puts: list[Put] = field(default_factory=list)


@dataclass(slots=True)
class _Receive(_Flow):
    batches: list[CopyBatch] = field(default_factory=list)
    credit: int = 0


class OneSidedProgram:
    """A schedule bound to this rank's weights and its peers' memory. Built by a transport's `prepare`."""

    def __init__(
        self,
        schedule: Schedule,
        memory: PeerMemory,
        buffers: ReceiveBuffers,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        timeout_s: float,
    ) -> None:
        """`buffers` must be attached to `memory`. Collective."""
        self._schedule = schedule
        self._memory = memory
        self._buffers = buffers
        self._sides = LocalSides(source, destination, schedule, buffers.window)
        self._timeout_s = timeout_s
        self._sends = [_Send(channel, channel.destination) for channel in schedule.sends]
        self._receives = [_Receive(channel, channel.source) for channel in schedule.receives]
        self._local: list[CopyBatch] = []
        self._has_run = False
        self._bind()
        memory.barrier()

    @property
    def staging_bytes(self) -> int:
        return self._buffers.staging_bytes + self._sides.kept.most_bytes

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            if not self._copy_alone(clock):
                self._memory.begin(self._rebind_if_moved())
                self._sides.begin()
                self._open_run()
                clock.lap("bind")
                local = self._move(clock)
                for batch in local:
                    self._memory.copy_local(batch)
                clock.lap("local")
            self._memory.finish()
            clock.lap("wait")
        self._has_run = True
        sent = (put.batch for flow in self._sends for put in flow.puts)
        received = (batch for flow in self._receives for batch in flow.batches)
        return run_report(self._schedule, clock, sent, received)

    def close(self) -> None:
        self._sends, self._receives, self._local = [], [], []
        self._buffers.release()
        self._memory.close()

    def _copy_alone(self, clock: PhaseClock) -> bool:
        """Run the local copies, each once its weights were found where it has them: GPUs copy while the next are looked
        for, some tenths of a millisecond of many parameters.

        False where peers have a part in this run, or weights have new storage. What has been copied then is copied
        again.
        """
        if not self._has_run or self._sends or self._receives:
            return False
        self._memory.begin(False)
        for batch in self._local:
            if not batch.is_where_it_was():
                return False
            self._memory.copy_local(batch)
        clock.lap("local")
        return True

    def _open_run(self) -> None:
        window = self._buffers.window
        for flow in (*self._sends, *self._receives):
            flow.position = 0
            if window is not None:
                # The first message of a run uses slot 0: skip the slots that the previous run left unused.
                flow.total = -(-flow.total // window) * window
        for receive in self._receives:
            # Credit of this run: weights may be overwritten from here on, and not before.
            self._give_credit(receive)

    def _move(self, clock: PhaseClock) -> list[CopyBatch]:
        """Move all messages of the run, with local copies in between. Returns the local copies that are left."""
        local = list(self._local)
        backoff = Backoff(self._timeout_s)
        step, enqueues = 0, self._memory.enqueues
        if enqueues and self._sides.passes_on:
            self._copy_local(local, len(local), clock)
        while pending := [flow for flow in (*self._sends, *self._receives) if not flow.is_done]:
            due = [flow for flow in pending if flow.message.step <= step] if enqueues else pending
            moved = self._progress(due, clock)
            step += 1
            # What is passed on may come from local copies: they do not wait until nothing else is to do.
            if local and (enqueues or not moved or self._sides.passes_on):
                self._copy_local(local, 1, clock)
                moved = True
            if moved or enqueues:  # a step may have no message of this rank
                backoff.renew()
            else:
                backoff.wait(self._memory.rank, self._awaited(pending))
                clock.lap("wait")
        return local

    def _copy_local(self, local: list[CopyBatch], number: int, clock: PhaseClock) -> None:
        """Run `number` of the batches in `local`, and remove them there."""
        for _ in range(number):
            self._memory.copy_local(local.pop())
        clock.lap("local")

    def _awaited(self, pending: Sequence[_Flow]) -> int:
        """A peer that this rank waits for: not one that waits for this rank, which lacks what it is to pass on."""
        sides = self._sides
        waits = (
            flow
            for flow in pending
            if (
                sides.kept.has_room(flow.message, flow.peer)
                if isinstance(flow, _Receive)
                else sides.is_there(flow.message)
            )
        )
        return next(waits, pending[0]).peer

    def _progress(self, due: Sequence[_Flow], clock: PhaseClock) -> bool:
        """Move at most one message of every channel in `due`, so that all of them advance together. False where none
        was ready.

        Puts come before unpacking, as the module's docstring requires.
        """
        moved = False
        for flow in due:
            if not isinstance(flow, _Send) or not self._sides.is_there(flow.message):
                continue
            if self._memory.reached(flow.peer, Counter.CREDIT, flow.total + 1):
                self._renew_if_moved(flow)
                self._memory.send(flow.peer, flow.puts[flow.position], flow.total + 1)
                self._sides.kept.went(flow.message, flow.peer)
                flow.advance()
                clock.lap("put")
                moved = True
            elif self._buffers.keeps_order:
                break
        for receive in due:
            if not isinstance(receive, _Receive) or not self._sides.kept.has_room(receive.message, receive.peer):
                continue
            if self._memory.reached(receive.peer, Counter.ARRIVED, receive.total + 1):
                self._memory.unpack(receive.peer, receive.batches[receive.position])
                receive.advance()
                self._give_credit(receive)
                clock.lap("unpack")
                moved = True
        return moved

    def _renew_if_moved(self, flow: _Send) -> None:
        if self._buffers.has_moved(flow.peer):
            self._reach(flow.peer)
            flow.puts = self._puts(flow.channel)

    def _reach(self, peer: int) -> None:
        """Let the source know what it can write of `peer`."""
        theirs = self._buffers.weights_of(peer)
        if theirs is not None and self._sides.source is not None:
            self._sides.source.reaches(peer, theirs)

    def _puts(self, channel: Channel) -> list[Put]:
        puts = self._buffers.puts(channel, self._sides.read_by)
        for put, message in zip(puts, channel.messages, strict=True):
            bind_kept(self._sides.kept, put.batch, message, channel.destination, sends=True)
            put.batch.before = self._sides.before_reading(message)
        return puts

    def _unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        batches = self._buffers.unpack_batches(channel)
        for batch, message in zip(batches, channel.messages, strict=True):
            bind_kept(self._sides.kept, batch, message, channel.source, sends=False)
            batch.after = self._sides.after_writing(message.parts)
        return batches

    def _give_credit(self, flow: _Receive) -> None:
        """Let the source write what it may now that `flow.position` messages of this run have been unpacked."""
        credit = flow.total - flow.position + self._buffers.credit(flow.channel, flow.position)
        if credit > flow.credit:
            flow.credit = credit
            self._memory.raise_counter(flow.peer, Counter.CREDIT, credit)

    def _rebind_if_moved(self) -> bool:
        """Bind again where weights have new storage. Returns whether the run has copies that have not run before."""
        self._sides.refresh()
        self._buffers.rebind()
        if self._bound_to != self._sides.generations:
            self._bind()
            return True
        return not self._has_run

    def _bind(self) -> None:
        sides = self._sides
        sides.refresh()
        sides.unbind()
        self._bound_to = sides.generations
        for flow in self._sends:
            self._reach(flow.peer)
        for flow in self._sends:
            flow.puts = self._puts(flow.channel)
        for receive in self._receives:
            receive.batches = self._unpack_batches(receive.channel)
        schedule, batch_bytes = self._schedule, self._memory.local_batch_bytes
        self._local = local_batches(
            schedule.local,
            schedule.zeros,
            sides.source,
            sides.destination,
            batch_bytes,
            after_writing=sides.after_writing,
            sends=bool(self._sends),
        )


class Backoff:
    """How a host thread waits without progress: it yields, then sleeps, and gives up after `timeout_s`."""

    # With more ranks than cores, a rank that only yields may still keep its core (Linux's EEVDF scheduler), so it soon
    # sleeps: 100 yields made the ring half as fast as 10.
    NUM_YIELDS = 10
    SLEEP_S = 20e-6

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.renew()

    def renew(self) -> None:
        """There was progress: start again."""
        self._turns = 0
        self._since = 0.0

    def wait(self, rank: int, peer: int) -> None:
        """Wait a little. Raises RefitError, naming `peer`, after `timeout_s` without progress."""
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
