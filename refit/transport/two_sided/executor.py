"""The two-sided executor: pack, send and receive, unpack, in rounds.

Round k moves message k of every pair. A rank that has posted round k waits for nothing but rounds before it, at both
ends of every pair; by induction every round ends, whoever sends to whom, with any number of peers and any bound on
staging, and without buffering by the backend. Up to `window` rounds are in flight at once, as long as each finds its
staging slots free: while the oldest is unpacked and the next is packed, those between are on the wire.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from refit.copies.batch import Copy, CopyBatch, load_kernels, local_batches, pack_copies, unpack_copies
from refit.errors import UnavailableError
from refit.models.weights import LocalWeights, generations
from refit.plan.plan import RefitPlan
from refit.transport.base import RunReport, TransportOptions
from refit.transport.messages import Channel, Framing, Message, Schedule, pair_buckets, schedule
from refit.transport.phases import PhaseClock
from refit.transport.two_sided.backends import (
    BackendTraits,
    Bound,
    GlooBackend,
    NcclBackend,
    P2PBackend,
    PendingRound,
    PinnedGlooBackend,
    connect_nccl_pairs,
)

LOCAL_BATCH_BYTES = {"cpu": 4 << 20, "cuda": 4 << 30}
"""On a CPU local copies take turns with the wire, a few at a time; on a GPU they have a stream of their own, and a
launch costs more than megabytes."""

LOCAL_PROGRAMS = 132
"""On a GPU: 3.2 of the 3.8 TB/s that all programs together reach, and the wire's kernels find room beside them."""

Copier = Callable[[Message, LocalWeights, torch.Tensor], list[Copy]]
"""`pack_copies` or `unpack_copies`."""


class TwoSidedTransport:
    """Sends and receives of torch.distributed: "gloo" for CPU weights (or CUDA ones, over the host), "nccl" for
    CUDA."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._group: dist.ProcessGroup | None = None

    def check_available(self) -> None:
        if self.name == "gloo" and not dist.is_gloo_available():
            raise UnavailableError("gloo needs a torch built with Gloo: install torch from its package index")
        if self.name == "nccl" and not torch.cuda.is_available():
            raise UnavailableError("nccl needs CUDA GPUs, this machine has none: use --refit-method gloo or shm")
        if self.name == "nccl" and not dist.is_nccl_available():
            raise UnavailableError("nccl needs a torch built with NCCL: install a CUDA build of torch, or use gloo")

    def connect(self, plan: RefitPlan, options: TransportOptions) -> None:
        """NCCL: a communicator of the plan's ranks, each pair connected. Gloo's process group is connected already."""
        if self.name != "nccl" or self._group is not None:
            return
        urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        self._group = dist.new_group(_ranks_of(plan), backend="nccl", pg_options=urgent)
        device = torch.device("cuda", torch.cuda.current_device())
        connect_nccl_pairs(plan, self._group, device)
        load_kernels(device)

    def prepare(
        self, plan: RefitPlan, source: LocalWeights | None, destination: LocalWeights | None, options: TransportOptions
    ) -> TwoSidedProgram:
        """Gloo talks over the default process group and prepares without communication; see `Transport.prepare`."""
        self.connect(plan, options)
        backend = self._backend(source if source is not None else destination, options)
        framed = _framed(plan, backend.traits, options)
        return TwoSidedProgram(framed, backend, backend.traits, source, destination, lambda: self._disconnect(plan))

    def _backend(self, memory: LocalWeights | None, options: TransportOptions) -> P2PBackend:
        if self._group is not None:
            return NcclBackend(options.timeout_s, torch.device("cuda", torch.cuda.current_device()), self._group)
        if memory is not None and memory.device.type == "cuda":
            return PinnedGlooBackend(options.timeout_s, memory.device)
        return GlooBackend(options.timeout_s)

    def _disconnect(self, plan: RefitPlan) -> None:
        if self._group is not None and dist.get_rank() in _ranks_of(plan):
            dist.destroy_process_group(self._group)
        self._group = None


def _ranks_of(plan: RefitPlan) -> list[int]:
    return sorted({*plan.source_sharding.ranks, *plan.destination_sharding.ranks})


def _framed(plan: RefitPlan, traits: BackendTraits, options: TransportOptions) -> Schedule:
    """Staging is divided over slots and, by their bytes, over peers."""
    staging_bytes = options.staging_bytes // traits.copies
    sizes = pair_buckets(plan, staging_bytes, traits.slots_per_peer, traits.bucket_bytes)
    return schedule(plan, dist.get_rank(), Framing(traits.bucket_bytes, traits.direct_send_threshold, sizes))


class _Ring:
    """The staging slots of one direction of one channel, taken in turn by the messages that need one."""

    def __init__(self, traits: BackendTraits) -> None:
        self._depth = traits.slots_per_peer
        self._pinned = traits.copies > 1
        self._num_programs = traits.num_programs
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for slot in self._slots.values() for part in slot if part is not None)

    def bind(self, messages: Sequence[Message], peer: int, memory: LocalWeights, copies: Copier) -> Iterator[Bound]:
        """Give each message its bytes: the weights themselves where they are one run of memory, else a slot."""
        # Pinned slots stand between the weights and the wire, so nothing can skip them.
        runs = [None if self._pinned else _run_of_memory(message, memory) for message in messages]
        staged = [number for number, run in enumerate(runs) if run is None]
        largest = max((messages[number].nbytes for number in staged), default=0)
        turns = {number: turn for turn, number in enumerate(staged)}
        for number, (message, run) in enumerate(zip(messages, runs, strict=True)):
            if run is not None:
                yield Bound(peer, run, None)
                continue
            turn = turns[number]
            device, host = self._slot(turn % self._depth, largest, memory.device)
            batch = CopyBatch(copies(message, memory, device), num_programs=self._num_programs)
            pinned = None if host is None else host[: message.nbytes]
            before = staged[turn - self._depth] if turn >= self._depth else -1
            yield Bound(peer, device[: message.nbytes], batch, pinned, before)

    def _slot(self, index: int, nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        slot = self._slots.get(index)
        if slot is None or slot[0].numel() < nbytes:
            host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self._pinned else None
            slot = self._slots[index] = (torch.empty(nbytes, dtype=torch.uint8, device=device), host)
        return slot


def _run_of_memory(message: Message, memory: LocalWeights) -> torch.Tensor | None:
    """A message's bytes where they lie in the weights, in the order and dtype of the wire; None where they do not."""
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
    """A schedule bound to this rank's weights and a wire. Made by `TwoSidedTransport.prepare`."""

    def __init__(
        self,
        framed: Schedule,
        backend: P2PBackend,
        traits: BackendTraits,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._schedule = framed
        self._backend = backend
        self._traits = traits
        self._source = source
        self._destination = destination
        self._release = release
        channels = (*framed.sends, *framed.receives)
        self._num_rounds = max((len(channel.messages) for channel in channels), default=0)
        self._sends: list[list[Bound]] = []
        self._receives: list[list[Bound]] = []
        self._local: list[CopyBatch] = []
        self._rings = {(channel.source, channel.destination): _Ring(traits) for channel in channels}
        self._bind()

    @property
    def staging_bytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings.values())

    def run(self) -> RunReport:
        clock = PhaseClock()
        with torch.no_grad():
            self._follow_weights()
            rounds = [
                PendingRound(sends, receives) for sends, receives in zip(self._sends, self._receives, strict=True)
            ]
            self._backend.begin()
            clock.lap("bind")
            ended = sent = 0
            for step, batches in enumerate(_spread(self._local, max(1, self._num_rounds))):
                if step < self._num_rounds:
                    while ended <= max(self._reuses[step], step - self._traits.window):
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
        """Put round `step` on the wire; the rounds that had its slots before have been sent, and ended here."""
        self._backend.pack(rounds[step].sends)
        clock.lap("pack")
        self._backend.post(rounds[step], rounds[self._reuses[step]] if self._reuses[step] >= 0 else None)
        clock.lap("wire")

    def _end(self, pending: PendingRound, clock: PhaseClock) -> None:
        self._backend.wait_received(pending)
        clock.lap("wire")
        self._backend.unpack(pending)
        clock.lap("unpack")

    def _follow_weights(self) -> None:
        """Rebind where the model has given a weight new storage."""
        if self._bound_to != generations(self._source, self._destination):
            self._bind()

    def _bind(self) -> None:
        self._bound_to = generations(self._source, self._destination)
        framed = self._schedule
        self._sends = self._rounds(framed.sends, self._source, pack_copies)
        self._receives = self._rounds(framed.receives, self._destination, unpack_copies)
        rounds = zip(self._sends, self._receives, strict=True)
        self._reuses = [max((bound.reuses for bound in (*sends, *receives)), default=-1) for sends, receives in rounds]
        memory = self._destination if self._destination is not None else self._source
        batch_bytes = LOCAL_BATCH_BYTES["cpu" if memory is None else memory.device.type]
        self._local = local_batches(
            framed.local, framed.zeros, self._source, self._destination, batch_bytes, LOCAL_PROGRAMS
        )

    def _rounds(self, channels: Sequence[Channel], memory: LocalWeights | None, copies: Copier) -> list[list[Bound]]:
        rounds: list[list[Bound]] = [[] for _ in range(self._num_rounds)]
        for channel in channels:
            assert memory is not None
            peer = channel.destination if copies is pack_copies else channel.source
            ring = self._rings[channel.source, channel.destination]
            for number, bound in enumerate(ring.bind(channel.messages, peer, memory, copies)):
                rounds[number].append(bound)
        return rounds


def _spread(batches: Sequence[CopyBatch], num_steps: int) -> Iterator[Sequence[CopyBatch]]:
    """`batches` in `num_steps` shares as even as they come, early rather than late."""
    shares = [-(-len(batches) * step // num_steps) for step in range(num_steps + 1)]
    for begin, end in itertools.pairwise(shares):
        yield batches[begin:end]
