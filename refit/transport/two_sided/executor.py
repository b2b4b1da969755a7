"""The two-sided executor: pack, send and receive, unpack, in rounds.

A round is what a rank sends and receives in one step of the schedule: in one stage, round k has message k of all its
pairs. Before a rank posts a round it waits for its earlier rounds only: for those whose slots it uses, for those a
window ago, and, where it passes something on, for those that brought it. Steps are the same for all ranks, and so is
the order (refit, step) of rounds. By induction over it every round ends, for any pattern of pairs, any stages, any
number of peers and any bound on staging, and the backend need not buffer.

Up to `window` rounds are in flight at once, provided that their staging slots are free. The oldest of them is unpacked
and the next is packed while those in between are transferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from refit.copies.batch import CopyBatch, local_batches
from refit.memory.phases import PhaseClock
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import RunReport, TransportOptions
from refit.transport.local_sides import LocalSides
from refit.transport.messages import Channel, Framing, Message, Schedule, pair_buckets
from refit.transport.packing import bind_kept, pack_batch, run_report, unpack_batch
from refit.transport.schedule import make_schedule
from refit.transport.two_sided.backend import BackendTraits, BoundMessage, P2PBackend, PendingRound

LOCAL_BATCH_BYTES = {"cpu": 4 << 20, "cuda": 4 << 30}
"""Bytes of local copies per batch, by device type. On a CPU they alternate with rounds, a few at a time. On a GPU they
have a stream of their own, and a launch costs more than copying megabytes."""

LOCAL_PROGRAMS = 132
"""Programs of the copy kernel for local copies. On a GPU they reach 3.2 of the 3.8 TB/s of all programs, and leave room
for the backend's kernels."""


def prepare_program(
    plan: RefitPlan,
    rank: int,
    backend: P2PBackend,
    source: LocalWeights | None,
    destination: LocalWeights | None,
    options: TransportOptions,
    release: Callable[[], None] | None = None,
    backend_bytes: int = 0,
) -> TwoSidedProgram:
    """Divide staging, make the schedule of this `rank`, and bind it. The program's `close` calls `release`.

    `backend_bytes` are what the backend has allocated itself, beyond `options.staging_bytes`.

    Raises UsageError where `options.staging_bytes` is too small. Does not communicate.
    """
    schedule = _schedule(plan, rank, backend.traits, options)
    return TwoSidedProgram(schedule, backend, source, destination, release, backend_bytes)


def _schedule(plan: RefitPlan, rank: int, traits: BackendTraits, options: TransportOptions) -> Schedule:
    """Staging is divided over peers in proportion to their bytes, and evenly over the slots of a peer."""
    staging_bytes, limit = options.staging_bytes // traits.copies, traits.most_bytes(is_packed=bool(options.max_bytes))
    sizes = pair_buckets(plan, staging_bytes, traits.slots_per_peer, limit)
    if options.max_bytes is not None and plan.num_stages > 1 and sizes:
        # What has been packed for one pair is passed on, as it is, to another.
        sizes = dict.fromkeys(sizes, min(sizes.values()))
    framing = Framing(limit, traits.direct_send_threshold, sizes, options.max_bytes)
    return make_schedule(plan, rank, framing)


class _Ring:
    """The staging slots of one end of a channel. Messages that need a slot use them in turn."""

    def __init__(self, traits: BackendTraits) -> None:
        self._depth = traits.slots_per_peer
        self._pinned = traits.copies > 1
        self._traits = traits
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for slot in self._slots.values() for part in slot if part is not None)

    def bind(
        self,
        messages: Sequence[Message],
        rounds: Sequence[int],
        peer: int,
        memory_of: Callable[[Message], LocalWeights],
        *,
        sends: bool,
    ) -> Iterator[BoundMessage]:
        """Bind each message to the weights themselves where they are contiguous, else to a slot. `rounds` has the round
        of each."""
        # The backend cannot read the device where slots are pinned, so every message needs a slot there.
        direct = [None if self._pinned else _contiguous_bytes(each, memory_of(each)) for each in messages]
        staged = [number for number, weights in enumerate(direct) if weights is None]
        largest = max((messages[number].buffer_bytes for number in staged), default=0)
        turns = {number: turn for turn, number in enumerate(staged)}
        for number, (message, weights) in enumerate(zip(messages, direct, strict=True)):
            if weights is not None:
                yield BoundMessage(peer, weights, None)
                continue
            turn, memory = turns[number], memory_of(message)
            device, host = self._slot(turn % self._depth, largest, memory.device)
            batch = self._batch(message, peer, memory, device, sends=sends)
            pinned = None if host is None else host[: message.buffer_bytes]
            before = rounds[staged[turn - self._depth]] if turn >= self._depth else -1
            yield BoundMessage(peer, device[: message.buffer_bytes], batch, pinned, before)

    def _batch(
        self, message: Message, peer: int, memory: LocalWeights, slot: torch.Tensor, *, sends: bool
    ) -> CopyBatch:
        traits = self._traits
        if sends:
            return pack_batch(message, memory, slot, traits.num_programs)
        return unpack_batch(message, memory, slot, peer, traits.num_programs)

    def _slot(self, index: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        slot = self._slots.get(index)
        if slot is None or slot[0].numel() < nbytes:
            host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self._pinned else None
            slot = self._slots[index] = (torch.empty(nbytes, dtype=torch.uint8, device=device), host)
        return slot


def _contiguous_bytes(message: Message, memory: LocalWeights) -> torch.Tensor | None:
    """A message's bytes in the weights, uint8; None where they are not contiguous there in the destination's dtype."""
    if len(message.pieces) != 1 or message.max_bytes is not None:
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
        backend_bytes: int = 0,
    ) -> None:
        self._backend_bytes = backend_bytes
        self._schedule = schedule
        self._backend = backend
        self._sides = LocalSides(source, destination, schedule)
        self._release = release
        channels = (*schedule.sends, *schedule.receives)
        steps = sorted({message.step for channel in channels for message in channel.messages})
        self._round_of = {step: number for number, step in enumerate(steps)}
        self._relayed = [list[Message]() for _ in steps]
        for message in (message for channel in schedule.sends for message in channel.messages if message.stage > 0):
            self._relayed[self._round_of[message.step]].append(message)
        # Stages of packed messages have rounds of their own (`schedule`), so as many more are in flight.
        packed = [
            message.stage for channel in channels for message in channel.messages if message.max_bytes is not None
        ]
        self._window = backend.traits.window * (1 + max(packed, default=0))
        self._sends: list[list[BoundMessage]] = []
        self._receives: list[list[BoundMessage]] = []
        self._local: list[CopyBatch] = []
        self._rings = {(channel.source, channel.destination): _Ring(backend.traits) for channel in channels}
        self._bind()

    @property
    def staging_bytes(self) -> int:
        slots = sum(ring.nbytes for ring in self._rings.values())
        return slots + self._backend_bytes + self._sides.kept.most_bytes

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            self._rebind_if_moved()
            rounds = [
                PendingRound(sends, receives) for sends, receives in zip(self._sends, self._receives, strict=True)
            ]
            self._backend.begin()
            self._sides.begin()
            clock.lap("bind")
            ended = sent = copied = 0
            for step, share in enumerate(_shares(len(self._local), max(1, len(rounds)))):
                if step < len(rounds):
                    if self._relayed[step]:
                        # What it passes on may come from local copies. They wait for nobody.
                        copied = self._copy_local(copied, len(self._local), clock)
                    needed = max(self._reuses[step], step - self._window)
                    while ended <= needed or not self._is_there(step):
                        self._end(rounds[ended], clock)
                        ended += 1
                    while sent <= self._reuses[step]:
                        self._backend.wait_sent(rounds[sent])
                        sent += 1
                    clock.lap("wire")
                    self._start(rounds, step, clock)
                copied = self._copy_local(copied, share, clock)
            for pending in rounds[ended:]:
                self._end(pending, clock)
            for pending in rounds[sent:]:
                self._backend.wait_sent(pending)
            self._backend.finish(rounds)
            clock.lap("wire")
        return run_report(self._schedule, clock, _batches(self._sends), _batches(self._receives))

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

    def _is_there(self, step: int) -> bool:
        """Whether what round `step` passes on has been written: by rounds before it, as their steps are smaller."""
        return all(self._sides.is_there(message) for message in self._relayed[step])

    def _copy_local(self, begin: int, end: int, clock: PhaseClock) -> int:
        """Run the local batches from `begin` to `end`. Returns how many have run."""
        for batch in self._local[begin:end]:
            self._backend.copy_local(batch)
        clock.lap("local")
        return max(begin, end)

    def _end(self, pending: PendingRound, clock: PhaseClock) -> None:
        self._backend.wait_received(pending)
        clock.lap("wire")
        self._backend.unpack(pending)
        clock.lap("unpack")

    def _rebind_if_moved(self) -> None:
        """Bind again where the model has given a weight new storage."""
        self._sides.refresh()
        if self._bound_to != self._sides.generations:
            self._bind()

    def _bind(self) -> None:
        schedule, sides = self._schedule, self._sides
        sides.refresh()
        sides.unbind()
        self._bound_to = sides.generations
        self._sends = self._rounds(schedule.sends, sides.read_by, sends=True)
        self._receives = self._rounds(schedule.receives, sides.written_by, sends=False)
        rounds = zip(self._sends, self._receives, strict=True)
        self._reuses = [max((bound.reuses for bound in (*sends, *receives)), default=-1) for sends, receives in rounds]
        self._local = local_batches(
            schedule.local,
            schedule.zeros,
            sides.source,
            sides.destination,
            LOCAL_BATCH_BYTES[sides.device.type],
            LOCAL_PROGRAMS,
            sides.after_writing,
            sends=bool(schedule.sends),
        )

    def _rounds(
        self, channels: Sequence[Channel], memory_of: Callable[[Message], LocalWeights], *, sends: bool
    ) -> list[list[BoundMessage]]:
        rounds: list[list[BoundMessage]] = [[] for _ in self._round_of]
        for channel in channels:
            peer = channel.destination if sends else channel.source
            ring = self._rings[channel.source, channel.destination]
            numbers = [self._round_of[message.step] for message in channel.messages]
            bound = ring.bind(channel.messages, numbers, peer, memory_of, sends=sends)
            for number, message, one in zip(numbers, channel.messages, bound, strict=True):
                _attach(one, message, self._sides, sends=sends)
                rounds[number].append(one)
        return rounds


def _attach(bound: BoundMessage, message: Message, sides: LocalSides, *, sends: bool) -> None:
    """Let the copies of `bound` call the hooks of `sides`. A message that needs no copies gets a batch for them."""
    bind_kept(sides.kept, bound.batch, message, bound.peer, sends=sends)
    hook = sides.before_reading(message) if sends else sides.after_writing(message.parts)
    if hook is None:
        return
    bound.batch = bound.batch or CopyBatch(())
    if sends:
        bound.batch.before = hook
    else:
        bound.batch.after = hook


def _batches(rounds: Iterable[Sequence[BoundMessage]]) -> Iterator[CopyBatch | None]:
    return (bound.batch for messages in rounds for bound in messages)


def _shares(num_batches: int, num_steps: int) -> list[int]:
    """How many batches have run after each of `num_steps`: nearly as many in each, and each as early as that allows."""
    return [-(-num_batches * step // num_steps) for step in range(1, num_steps + 1)]
