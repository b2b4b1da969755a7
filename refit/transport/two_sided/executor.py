"""The two-sided executor: pack, send and receive, unpack, in rounds.

Round k moves message k of every pair. Before a rank posts round k it waits for earlier rounds only. By induction every
round ends, for any pattern of pairs, any number of peers and any bound on staging, and the backend need not buffer.
Up to `window` rounds are in flight at once, provided that their staging slots are free. The oldest of them is unpacked
and the next is packed while those in between are transferred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from refit.copies.batch import CopyBatch, local_batches
from refit.copies.copy import Copy
from refit.memory.phases import PhaseClock
from refit.memory.weights import LocalWeights, generations, refresh_all
from refit.plan.plan import RefitPlan
from refit.transport.base import RunReport, TransportOptions
from refit.transport.messages import Channel, Framing, Message, Schedule, make_schedule, pair_buckets
from refit.transport.packing import pack_copies, unpack_copies
from refit.transport.two_sided.backend import BackendTraits, BoundMessage, P2PBackend, PendingRound

LOCAL_BATCH_BYTES = {"cpu": 4 << 20, "cuda": 4 << 30}
"""Bytes of local copies per batch, by device type. On a CPU they alternate with rounds, a few at a time. On a GPU they
have a stream of their own, and a launch costs more than copying megabytes."""

LOCAL_PROGRAMS = 132
"""Programs of the copy kernel for local copies. On a GPU they reach 3.2 of the 3.8 TB/s of all programs, and leave room
for the backend's kernels."""

Copier = Callable[[Message, LocalWeights, torch.Tensor], list[Copy]]
"""`pack_copies` or `unpack_copies`."""


def prepare_program(
    plan: RefitPlan,
    rank: int,
    backend: P2PBackend,
    source: LocalWeights | None,
    destination: LocalWeights | None,
    options: TransportOptions,
    release: Callable[[], None] | None = None,
) -> TwoSidedProgram:
    """Divide staging, make the schedule of this `rank`, and bind it. The program's `close` calls `release`.

    Raises UsageError where `options.staging_bytes` is too small. Does not communicate.
    """
    return TwoSidedProgram(_schedule(plan, rank, backend.traits, options), backend, source, destination, release)


def _schedule(plan: RefitPlan, rank: int, traits: BackendTraits, options: TransportOptions) -> Schedule:
    """Staging is divided over peers in proportion to their bytes, and evenly over the slots of a peer."""
    staging_bytes = options.staging_bytes // traits.copies
    sizes = pair_buckets(plan, staging_bytes, traits.slots_per_peer, traits.bucket_bytes)
    return make_schedule(plan, rank, Framing(traits.bucket_bytes, traits.direct_send_threshold, sizes))


class _Ring:
    """The staging slots of one end of a channel. Messages that need a slot use them in turn."""

    def __init__(self, traits: BackendTraits) -> None:
        self._depth = traits.slots_per_peer
        self._pinned = traits.copies > 1
        self._num_programs = traits.num_programs
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for slot in self._slots.values() for part in slot if part is not None)

    def bind(
        self, messages: Sequence[Message], peer: int, memory: LocalWeights, copies: Copier
    ) -> Iterator[BoundMessage]:
        """Bind each message to the weights themselves where they are contiguous, else to a slot."""
        # The backend cannot read the device where slots are pinned, so every message needs a slot there.
        direct = [None if self._pinned else _contiguous_bytes(message, memory) for message in messages]
        staged = [number for number, weights in enumerate(direct) if weights is None]
        largest = max((messages[number].nbytes for number in staged), default=0)
        turns = {number: turn for turn, number in enumerate(staged)}
        for number, (message, weights) in enumerate(zip(messages, direct, strict=True)):
            if weights is not None:
                yield BoundMessage(peer, weights, None)
                continue
            turn = turns[number]
            device, host = self._slot(turn % self._depth, largest, memory.device)
            batch = CopyBatch(copies(message, memory, device), num_programs=self._num_programs)
            pinned = None if host is None else host[: message.nbytes]
            before = staged[turn - self._depth] if turn >= self._depth else -1
            yield BoundMessage(peer, device[: message.nbytes], batch, pinned, before)

    def _slot(self, index: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        slot = self._slots.get(index)
        if slot is None or slot[0].numel() < nbytes:
            host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self._pinned else None
            slot = self._slots[index] = (torch.empty(nbytes, dtype=torch.uint8, device=device), host)
        return slot


def _contiguous_bytes(message: Message, memory: LocalWeights) -> torch.Tensor | None:
    """A message's bytes in the weights, uint8; None where they are not contiguous there in the destination's dtype."""
    if len(message.pieces) != 1:
        return None
    piece = message.pieces[0]
    views = memory.views(piece.tensor.key, piece.box)
    if (
        len(views) != 1
        or not views[0].data.is_contiguous()
        or views[0].data.dtype != getattr(torch, piece.tensor.dtype)
    ):
        return None
    return views[0].data.view(-1).view(torch.uint8)


class TwoSidedProgram:
    """A schedule bound to this rank's weights and a backend. Built by `prepare_program`."""

    def __init__(
        self,
        schedule: Schedule,
        backend: P2PBackend,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._schedule = schedule
        self._backend = backend
        self._source = source
        self._destination = destination
        self._release = release
        channels = (*schedule.sends, *schedule.receives)
        self._num_rounds = max((len(channel.messages) for channel in channels), default=0)
        self._sends: list[list[BoundMessage]] = []
        self._receives: list[list[BoundMessage]] = []
        self._local: list[CopyBatch] = []
        self._rings = {(channel.source, channel.destination): _Ring(backend.traits) for channel in channels}
        self._bind()

    @property
    def staging_bytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings.values())

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            self._rebind_if_moved()
            rounds = [
                PendingRound(sends, receives) for sends, receives in zip(self._sends, self._receives, strict=True)
            ]
            self._backend.begin()
            clock.lap("bind")
            ended = sent = 0
            for step, batches in enumerate(_shares(self._local, max(1, self._num_rounds))):
                if step < self._num_rounds:
                    while ended <= max(self._reuses[step], step - self._backend.traits.window):
                        self._end(rounds[ended], clock)
                        ended += 1
                    while sent <= self._reuses[step]:
                        self._backend.wait_sent(rounds[sent])
                        sent += 1
                    clock.lap("wire")
                    self._start(rounds, step, clock)
                for batch in batches:
                    self._backend.copy_local(batch)
                clock.lap("local")
            for pending in rounds[ended:]:
                self._end(pending, clock)
            for pending in rounds[sent:]:
                self._backend.wait_sent(pending)
            self._backend.finish(rounds)
            clock.lap("wire")
        return self._schedule.report(clock)

    def close(self) -> None:
        self._sends, self._receives, self._local = [], [], []
        self._rings.clear()
        if self._release is not None:
            self._release()
            self._release = None

    def _start(self, rounds: Sequence[PendingRound], step: int, clock: PhaseClock) -> None:
        """Pack and post round `step`. The rounds that used its slots before have been sent and have ended here."""
        self._backend.pack(rounds[step].sends)
        clock.lap("pack")
        self._backend.post(rounds[step], rounds[self._reuses[step]] if self._reuses[step] >= 0 else None)
        clock.lap("wire")

    def _end(self, pending: PendingRound, clock: PhaseClock) -> None:
        self._backend.wait_received(pending)
        clock.lap("wire")
        self._backend.unpack(pending)
        clock.lap("unpack")

    def _rebind_if_moved(self) -> None:
        """Bind again where the model has given a weight new storage."""
        refresh_all(self._source, self._destination)
        if self._bound_to != generations(self._source, self._destination):
            self._bind()

    def _bind(self) -> None:
        refresh_all(self._source, self._destination)
        self._bound_to = generations(self._source, self._destination)
        schedule = self._schedule
        self._sends = self._rounds(schedule.sends, self._source, pack_copies)
        self._receives = self._rounds(schedule.receives, self._destination, unpack_copies)
        rounds = zip(self._sends, self._receives, strict=True)
        self._reuses = [max((bound.reuses for bound in (*sends, *receives)), default=-1) for sends, receives in rounds]
        memory = self._destination if self._destination is not None else self._source
        batch_bytes = LOCAL_BATCH_BYTES["cpu" if memory is None else memory.device.type]
        self._local = local_batches(
            schedule.local, schedule.zeros, self._source, self._destination, batch_bytes, LOCAL_PROGRAMS
        )

    def _rounds(
        self, channels: Sequence[Channel], memory: LocalWeights | None, copies: Copier
    ) -> list[list[BoundMessage]]:
        rounds: list[list[BoundMessage]] = [[] for _ in range(self._num_rounds)]
        for channel in channels:
            assert memory is not None
            peer = channel.destination if copies is pack_copies else channel.source
            ring = self._rings[channel.source, channel.destination]
            bound = list(ring.bind(channel.messages, peer, memory, copies))
            for step, message, one in zip(rounds, channel.messages, bound, strict=False):
                _attach(one, message, memory, sends=copies is pack_copies)
                step.append(one)
        return rounds


def _attach(bound: BoundMessage, message: Message, memory: LocalWeights, *, sends: bool) -> None:
    """Let the copies of `bound` call the hooks of `memory`. A message that needs no copies gets a batch for them."""
    hook = memory.before_reading(message.parts) if sends else memory.after_writing(message.parts)
    if hook is None:
        return
    bound.batch = bound.batch or CopyBatch(())
    if sends:
        bound.batch.before = hook
    else:
        bound.batch.after = hook


def _shares(batches: Sequence[CopyBatch], num_steps: int) -> Iterator[Sequence[CopyBatch]]:
    """`batches` in `num_steps` shares of nearly equal size, each batch as early as that allows."""
    shares = [-(-len(batches) * step // num_steps) for step in range(num_steps + 1)]
    for begin, end in itertools.pairwise(shares):
        yield batches[begin:end]
