"""Where sources write: into a bounded ring that the destination unpacks, or into its weights directly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from refit.copies.batch import CopyBatch, weight_copies
from refit.errors import RefitError
from refit.memory.views import span_bytes
from refit.memory.weights import LocalShard, LocalWeights
from refit.transport.messages import Channel, Message, Schedule
from refit.transport.one_sided.peer_memory import PeerHeap, Put
from refit.transport.one_sided.places import Place, mapped_weights, strided
from refit.transport.packing import pack_batch, unpack_batch

HEAP_ALIGNMENT = 64
"""Weights start at multiples of this in a heap."""


class ReceiveBuffers(Protocol):
    """The part of a destination's memory that sources write, and the copies at both ends. Attached when constructed or
    by `attach`, which allocates this rank's heap and learns where in their heaps peers expect messages.

    `window` is the number of slots of each source, where a message's number over all runs says which it uses; None
    elsewhere. `keeps_order`: a source waits for credit of one peer before it sends to the next. Where all credit of a
    run comes at its begin, the order of the sends is worth that.
    """

    window: int | None
    keeps_order: bool

    @property
    def staging_bytes(self) -> int:
        """Bytes allocated beyond the models."""
        ...

    def credit(self, channel: Channel, position: int) -> int:
        """How many messages of a run may have been written once `position` of them have been unpacked.

        More than it has are messages of the next run. There are none where messages are written into weights, which may
        be in use until that run begins.
        """
        ...

    def puts(self, channel: Channel, read_by: Callable[[Message], LocalWeights]) -> list[Put]:
        """For each message, the copies from the weights that it is `read_by` into the peer's memory."""
        ...

    def weights_of(self, peer: int) -> LocalWeights | None:
        """The weights of `peer` that `puts` writes into, if the host knows of credit before a put is enqueued.

        None elsewhere, and where `puts` writes messages for `peer` to unpack.
        """
        ...

    def unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        """For each message, the copies from the memory that sources write into this rank's weights."""
        ...

    def rebind(self) -> None:
        """Where peers write weights directly: let them find weights that have new storage."""
        ...

    def has_moved(self, peer: int) -> bool:
        """Whether the memory of `peer` that this rank writes has changed since the last call: `puts` must be renewed.

        Called once `peer` has given credit.
        """
        ...

    def release(self) -> None:
        """Drop all references to peers' memory. Weights in this rank's heap get memory of their own."""
        ...


@dataclass(frozen=True, slots=True)
class _Target:
    """The ring in a peer's heap for messages of this rank. It begins at byte `start` of that heap.

    `ring` is that ring where it is mapped. Otherwise it is None, and messages are packed in `outgoing`, one slot of
    this rank's heap.
    """

    start: int
    ring: torch.Tensor | None
    outgoing: torch.Tensor | None


class RingBuffers:
    """A ring of `window` slots of `slot_bytes` for each source. Message n, counted over all runs, uses slot n % window.

    `put_programs` limits the programs of a copy kernel that writes to a peer; None is no limit.
    """

    keeps_order = False

    def __init__(
        self,
        destination: LocalWeights | None,
        window: int,
        slot_bytes: int,
        put_programs: int | None = None,
    ) -> None:
        self.window: int | None = window
        self.staging_bytes = 0
        self._num_slots = window
        self._slot_bytes = slot_bytes
        self._destination = destination
        self._put_programs = put_programs

    def attach(self, memory: PeerHeap, schedule: Schedule) -> None:
        """Collective: every rank of `memory`."""
        sources = [channel.source for channel in schedule.receives]
        ring_bytes = self._num_slots * self._slot_bytes
        starts = {source: ring_bytes * number for number, source in enumerate(sources)}
        targets = [channel.destination for channel in schedule.sends]
        staged = [target for target in targets if not memory.is_mapped(target)]
        outgoing_start = len(sources) * ring_bytes
        self.staging_bytes = outgoing_start + len(staged) * self._slot_bytes
        heap = memory.allocate(self.staging_bytes)
        self._own = {source: heap[start : start + ring_bytes] for source, start in starts.items()}
        self._targets = {}
        for target, their_starts in memory.exchange(starts, targets).items():
            start = their_starts[schedule.rank]
            if target in staged:
                place = outgoing_start + staged.index(target) * self._slot_bytes
                self._targets[target] = _Target(start, None, heap[place : place + self._slot_bytes])
            else:
                self._targets[target] = _Target(start, memory.peer(target)[start : start + ring_bytes], None)

    def credit(self, channel: Channel, position: int) -> int:
        return position + self._num_slots

    def puts(self, channel: Channel, read_by: Callable[[Message], LocalWeights]) -> list[Put]:
        target = self._targets[channel.destination]
        return [self._put(number, message, target, read_by(message)) for number, message in enumerate(channel.messages)]

    def weights_of(self, peer: int) -> LocalWeights | None:
        return None

    def unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        assert self._destination is not None
        ring = self._own[channel.source]
        return [
            unpack_batch(message, self._destination, self._slot(ring, number), channel.source)
            for number, message in enumerate(channel.messages)
        ]

    def rebind(self) -> None:
        """Does nothing: no peer writes weights."""

    def has_moved(self, peer: int) -> bool:
        return False

    def release(self) -> None:
        self._own, self._targets = {}, {}

    def _put(self, number: int, message: Message, target: _Target, source: LocalWeights) -> Put:
        if target.ring is not None:
            return Put(pack_batch(message, source, self._slot(target.ring, number), self._put_programs))
        assert target.outgoing is not None
        packed = target.outgoing[: message.buffer_bytes]
        batch = pack_batch(message, source, packed, sends_all=True)
        return Put(batch, packed, target.start + self._slot_start(number))

    def _slot(self, ring: torch.Tensor, number: int) -> torch.Tensor:
        start = self._slot_start(number)
        return ring[start : start + self._slot_bytes]

    def _slot_start(self, number: int) -> int:
        return number % self._num_slots * self._slot_bytes


@dataclass(frozen=True, slots=True)
class _Home:
    """The `place` of `owner` in the heap. `keeps`: a run does not write all of it, so what it has moves with it."""

    owner: torch.Tensor
    place: torch.Tensor
    keeps: bool

    @property
    def is_used(self) -> bool:
        return self.owner.data_ptr() == self.place.data_ptr()


class DirectBuffers:
    """Sources write the destination's weights in its heap, without staging.

    The weights move there when the first run begins, and are what they were until then. A run writes all of them, so
    they need not be copied. From `attach` to the first run their old and their new memory are both allocated;
    afterwards there is no memory beyond the models.
    """

    window: int | None = None
    keeps_order = True
    staging_bytes = 0

    def __init__(
        self,
        destination: LocalWeights | None,
        put_programs: int | None = None,
        map_ahead: Callable[[Iterable[torch.Tensor]], None] | None = None,
    ) -> None:
        """`put_programs`: see `RingBuffers`. `map_ahead` is told what of the peers' heaps this rank will write."""
        self._destination = destination
        self._put_programs = put_programs
        self._map_ahead = map_ahead
        self._homes: list[_Home] = []

    def attach(self, memory: PeerHeap, schedule: Schedule) -> None:
        """Collective: every rank of `memory`."""
        shards = [] if self._destination is None else list(self._destination)
        owners = [] if self._destination is None else _distinct_owners(self._destination)
        sizes = [-(-span_bytes(owner) // HEAP_ALIGNMENT) * HEAP_ALIGNMENT for owner in owners]
        starts = [0, *itertools.accumulate(sizes)]
        heap = memory.allocate(starts.pop())
        kept = _kept(shards, schedule)
        start_of = {id(owner): start for owner, start in zip(owners, starts, strict=True)}
        for owner in owners:
            place = strided(heap, owner.dtype, start_of[id(owner)], owner.size(), owner.stride())
            self._homes.append(_Home(owner, place, keeps=id(owner) in kept))
        places = [_place_at(start_of[id(shard.owner)], shard) for shard in shards]
        targets = [channel.destination for channel in schedule.sends]
        found = memory.exchange(places, targets)
        # The pieces of a message go to many weights, and one put to an unmapped heap cannot write them all.
        assert all(memory.is_mapped(target) for target in targets)
        self._peers = {target: mapped_weights([memory.peer(target)], found[target]) for target in targets}

    def credit(self, channel: Channel, position: int) -> int:
        return len(channel.messages)

    def puts(self, channel: Channel, read_by: Callable[[Message], LocalWeights]) -> list[Put]:
        target = self._peers[channel.destination]
        by_message = [
            [
                copy
                for piece in message.pieces
                for copy in weight_copies(piece.tensor, piece.box, read_by(message), target)
            ]
            for message in channel.messages
        ]
        if self._map_ahead is not None:
            self._map_ahead(copy.destination for copies in by_message for copy in copies)
        return [Put(CopyBatch(copies, num_programs=self._put_programs)) for copies in by_message]

    def weights_of(self, peer: int) -> LocalWeights | None:
        peer_weights = self._peers[peer]
        # On a GPU, a put may be enqueued behind a wait for credit, which no other stream knows of.
        return peer_weights if peer_weights.device.type == "cpu" else None

    def unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        return [CopyBatch(()) for _ in channel.messages]

    def rebind(self) -> None:
        """Move weights with storage elsewhere into the heap: all of them in the first run."""
        moved = [home for home in self._homes if not home.is_used]
        for home in moved:
            if home.keeps:
                home.place.copy_(home.owner.detach())
            home.owner.data = home.place
        if moved and self._destination is not None:
            self._destination.refresh()

    def has_moved(self, peer: int) -> bool:
        return False

    def release(self) -> None:
        self._peers = {}
        for home in self._homes:
            if home.is_used:
                home.owner.data = home.place.clone()
        self._homes = []
        if self._destination is not None:
            self._destination.refresh()


def _place_at(start: int, shard: LocalShard) -> Place:
    """Where `shard` will be in a heap in which its owner begins at byte `start`."""
    view = shard.view
    offset = start + view.data_ptr() - shard.owner.data_ptr()
    return Place(shard.tensor, shard.box, view.dtype, offset, view.stride())


def _kept(shards: Sequence[LocalShard], schedule: Schedule) -> set[int]:
    """The ids of owners of which a run leaves something as it was: no shard has it, as padding, or no message."""
    written = schedule.totals.received_bytes
    written += sum(transfer.nbytes for transfer in (*schedule.local, *schedule.zeros))
    writes_all = written == sum(shard.view.nbytes for shard in shards)
    left = {id(shard.owner): shard.owner.numel() for shard in shards}
    for shard in shards:
        left[id(shard.owner)] -= shard.view.numel()
    return {owner for owner, number in left.items() if number or not writes_all}


def _distinct_owners(memory: LocalWeights) -> list[torch.Tensor]:
    """Raises RefitError where two owners overlap, because separate memory would end that sharing."""
    owners = list({id(shard.owner): shard.owner for shard in memory}.values())
    ordered = sorted(owners, key=lambda owner: owner.data_ptr())
    for before, after in itertools.pairwise(ordered):
        if before.data_ptr() + span_bytes(before) > after.data_ptr():
            raise RefitError("two weights share memory, which direct buffers would part: use --one-sided-buffers ring")
    return owners
