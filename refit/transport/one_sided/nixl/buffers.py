"""Where a source writes over NIXL: into the destination's weights, or into a ring that the destination unpacks.

A message is written in place where all of it is in runs that are long at both ends. The source decides, because it
knows both, and tells the destination, once: weights keep their strides when they move. All other messages are packed
into a slot of registered staging at the source, written into the same slot at the destination, and unpacked there:

    long runs     weights ----------------------------------------------> weights
    short ones    weights --pack--> slot k % window --> slot k % window --unpack--> weights

Slots are those of a run's staged messages, which alone wait for one: the others have credit from the run's begin on. A
slot needs no other guard than credit: with it, the destination has unpacked what was in both slots before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from refit.copies.batch import CopyBatch
from refit.memory.weights import LocalWeights, generations
from refit.transport.messages import ALIGNMENT, Channel, Message, Schedule
from refit.transport.one_sided.nixl.library import Region, Registration
from refit.transport.one_sided.nixl.memory import NixlMemory, NixlPut
from refit.transport.one_sided.nixl.runs import (
    LEAST_RUN_BYTES,
    Rows,
    copies_to,
    descriptor,
    descriptors,
    put_together,
    run_bytes,
    runs_of,
    weights_at,
)
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.one_sided.places import Place, all_bytes, place_of
from refit.transport.packing import pack_batch, unpack_batch


@dataclass(frozen=True, slots=True)
class Offer:
    """What a destination tells its sources of its weights: where its shards lie, by address, in which regions."""

    places: tuple[Place, ...]
    regions: tuple[Region, ...]
    metadata: bytes


@dataclass(frozen=True, slots=True)
class _Ring:
    """Where in a destination's staging a source writes: from byte `address` of device number `device` on."""

    address: int
    device: int
    metadata: bytes


@dataclass(slots=True)
class _Target:
    """A destination as one of its sources knows it.

    `staged` are the numbers of the messages that pass through slots, `told` those before messages were put together.
    """

    offer: Offer
    weights: LocalWeights
    told: Sequence[int] = ()
    staged: Sequence[int] = ()
    slot_bytes: int = 0
    num_moves: int = 0
    outgoing: torch.Tensor | None = None
    ring: _Ring | None = None


@dataclass(slots=True)
class _Own:
    """This rank's registered weights, at the generations `bound_to`."""

    registration: Registration
    bound_to: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A put without its write: what packs the message, and descriptors here and there."""

    batch: CopyBatch
    packed: torch.Tensor | None
    rows: tuple[Rows, Rows]


class NixlBuffers:
    """The `ReceiveBuffers` of NIXL. Weights with new storage are registered, and offered, again."""

    window: int | None = None
    keeps_order = False

    def __init__(
        self,
        memory: NixlMemory,
        schedule: Schedule,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        window: int,
        *,
        is_staged: bool,
    ) -> None:
        """`is_staged`: no message is written in place. Collective: every rank of `memory`."""
        self._num_slots = window
        self._memory = memory
        self._source, self._destination = source, destination
        self._least_run_bytes = LEAST_RUN_BYTES
        self._is_staged = is_staged
        self._sources = [channel.source for channel in schedule.receives]
        self._passes_on = any(message.stage for channel in schedule.sends for message in channel.messages)
        self._num_offers = 0
        self._stale: list[Registration] = []
        self._own = self._registered(memory.register_everywhere)
        self._meet(schedule)
        self.schedule = self._agreed(schedule)
        self._allocate()

    def _meet(self, schedule: Schedule) -> None:
        memory, offer = self._memory, self._offer()
        targets = [channel.destination for channel in schedule.sends]
        peers = sorted({*targets, *self._sources})
        hello = memory.exchange((memory.inbox, offer), peers)
        for peer, (inbox, theirs) in hello.items():
            memory.meet(peer, inbox, theirs.metadata)
        self._targets = {peer: _Target(hello[peer][1], weights_at(hello[peer][1].places)) for peer in targets}

    def _agreed(self, schedule: Schedule) -> Schedule:
        """Find which messages are written in place, and how large a slot the others need.

        Returns the schedule with the former put together.
        """
        sends = []
        for channel in schedule.sends:
            target = self._targets[channel.destination]
            staged = [n for n, each in enumerate(channel.messages) if not self._is_in_place(each, target)]
            most = max((channel.messages[number].buffer_bytes for number in staged), default=0)
            target.slot_bytes = -(-most // ALIGNMENT) * ALIGNMENT
            target.told = staged
            joined, target.staged = put_together(channel, staged)
            sends.append(joined)
        told = {peer: (target.told, target.slot_bytes) for peer, target in self._targets.items()}
        found = self._memory.exchange(told, self._sources)
        self._staged, self._slot_bytes, receives = {}, {}, []
        for channel in schedule.receives:
            staged, self._slot_bytes[channel.source] = found[channel.source][self._memory.rank]
            joined, self._staged[channel.source] = put_together(channel, staged)
            receives.append(joined)
        return replace(schedule, sends=tuple(sends), receives=tuple(receives))

    def _allocate(self) -> None:
        """Allocate staging, register it, and tell the sources where their rings are."""
        memory, window = self._memory, self._num_slots
        sizes = [*self._slot_bytes.values(), *(target.slot_bytes for target in self._targets.values())]
        self.staging_bytes = window * sum(sizes)
        heap = torch.zeros(self.staging_bytes, dtype=torch.uint8, device=memory.device)
        self._heap = memory.register_everywhere([heap])
        parts = iter(torch.split(heap, [window * size for size in sizes]))
        self._rings = {peer: next(parts) for peer in self._sources}
        for target in self._targets.values():
            target.outgoing = next(parts)
        metadata, device = memory.offered(self._heap), self._heap.regions[0].device if self.staging_bytes else 0
        rings = {peer: _Ring(ring.data_ptr(), device, metadata) for peer, ring in self._rings.items()}
        for peer, theirs in memory.exchange(rings, list(self._targets)).items():
            target = self._targets[peer]
            target.ring = theirs[memory.rank]
            memory.learn(peer, target.ring.metadata)

    def credit(self, channel: Channel, position: int) -> int:
        """Up to the next staged message that finds no free slot."""
        staged = self._staged[channel.source]
        full = bisect_left(staged, position) + self._num_slots
        return staged[full] if full < len(staged) else len(channel.messages)

    def puts(self, channel: Channel, read_by: Callable[[Message], LocalWeights]) -> list[Put]:
        target = self._targets[channel.destination]
        slots = _slots(target.staged, self._num_slots)
        drafts = [
            self._draft(message, slots.get(number), target, read_by(message))
            for number, message in enumerate(channel.messages)
        ]
        own, theirs = (np.concatenate([draft.rows[end] for draft in drafts]) for end in (0, 1))
        lists = self._memory.listed(None, own), self._memory.listed(channel.destination, theirs)
        ends = np.cumsum([len(draft.rows[0]) for draft in drafts])
        puts: list[Put] = []
        for draft, message, end in zip(drafts, channel.messages, ends.tolist(), strict=True):
            numbers = np.arange(end - len(draft.rows[0]), end, dtype=np.int32)
            # How long a message is that an encoding packs is known once it is packed.
            write = self._memory.write(*lists, numbers) if message.max_bytes is None else None
            puts.append(NixlPut(draft.batch, draft.packed, write=write, rows=draft.rows))
        return puts

    def weights_of(self, peer: int) -> LocalWeights | None:
        return None  # this rank cannot address them

    def unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        assert self._destination is not None
        peer, ring = channel.source, self._rings[channel.source]
        slots, size = _slots(self._staged[peer], self._num_slots), self._slot_bytes[peer]
        return [
            unpack_batch(message, self._destination, _slot(ring, slots[number], size), peer)
            if number in slots
            else CopyBatch(())
            for number, message in enumerate(channel.messages)
        ]

    def rebind(self) -> None:
        """Register weights with new storage, and offer them to the sources."""
        for registration in self._stale:  # nothing is bound to it since the last run began
            self._memory.deregister(registration)
        self._stale = []
        if self._own.bound_to == generations(self._source, self._destination):
            return
        self._stale.append(self._own.registration)
        self._own = self._registered(self._memory.register)
        if self._sources and not self._is_staged:
            self._num_offers += 1
            self._memory.publish(_key(self._num_offers), self._offer())
            for peer in self._sources:
                self._memory.raise_counter(peer, Counter.MOVED, self._num_offers)

    def has_moved(self, peer: int) -> bool:
        target = self._targets[peer]
        newest = target.num_moves
        while self._memory.reached(peer, Counter.MOVED, newest + 1):
            newest += 1
        if newest == target.num_moves:
            return False
        target.num_moves = newest
        target.offer = self._memory.fetch(peer, _key(newest))
        target.weights = weights_at(target.offer.places)
        self._memory.learn(peer, target.offer.metadata)
        return True

    def release(self) -> None:
        self._targets, self._rings = {}, {}

    def _registered(self, register: Callable[[Sequence[torch.Tensor]], Registration]) -> _Own:
        """The storages of all weights that messages are read from or written into, registered by `register`."""
        bound_to = generations(self._source, self._destination)
        if self._is_staged:
            return _Own(register([]), bound_to)
        written = self._destination if self._sources or self._passes_on else None
        shards = [shard for weights in (self._source, written) for shard in weights or ()]
        storages = {shard.view.untyped_storage().data_ptr(): shard.view.untyped_storage() for shard in shards}
        ordered = [all_bytes(storages[address]) for address in sorted(storages)]
        return _Own(register(ordered), bound_to)

    def _offer(self) -> Offer:
        metadata = self._memory.offered(self._own.registration)
        if self._is_staged or self._destination is None or not self._sources:
            return Offer((), (), metadata)
        places = tuple(place_of(shard, _no_region()) for shard in self._destination)
        return Offer(places, self._own.registration.regions, metadata)

    def _is_in_place(self, message: Message, target: _Target) -> bool:
        if self._is_staged:
            return False
        memory = self._source if message.stage == 0 else self._destination
        assert memory is not None
        return all(
            (nbytes := run_bytes(copy)) is not None and nbytes >= self._least_run_bytes
            for copy in copies_to(message, memory, target.weights)
        )

    def _draft(self, message: Message, slot: int | None, target: _Target, read: LocalWeights) -> _Draft:
        """`slot` is None for a message that is written in place."""
        if slot is None:
            runs = np.concatenate([runs_of(copy) for copy in copies_to(message, read, target.weights)])
            own = descriptors(runs[:, 0], runs[:, 2], self._own.registration.regions)
            return _Draft(CopyBatch(()), None, (own, descriptors(runs[:, 1], runs[:, 2], target.offer.regions)))
        assert target.outgoing is not None
        assert target.ring is not None
        nbytes = message.buffer_bytes
        packed = _slot(target.outgoing, slot, target.slot_bytes)[:nbytes]
        place = target.ring.address + slot * target.slot_bytes
        rows = (
            descriptor(packed.data_ptr(), nbytes, self._heap.regions[0].device),
            descriptor(place, nbytes, target.ring.device),
        )
        return _Draft(pack_batch(message, read, packed), packed, rows)


def _slots(staged: Sequence[int], num_slots: int) -> dict[int, int]:
    """The slots of the messages with these numbers."""
    return {number: order % num_slots for order, number in enumerate(staged)}


def _slot(ring: torch.Tensor, slot: int, slot_bytes: int) -> torch.Tensor:
    return ring[slot * slot_bytes : (slot + 1) * slot_bytes]


def _no_region() -> torch.Tensor:
    """What begins at address 0, for places that are addresses."""
    return torch.empty(0, dtype=torch.uint8)


def _key(number: int) -> str:
    return f"moved/{number}"
