"""Where one-sided writes land: in a bounded ring that the destination unpacks, or in its weights themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from refit.copies.batch import CopyBatch, pack_copies, unpack_copies, weight_copies
from refit.errors import RefitError
from refit.models.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec
from refit.transport.messages import Channel, Message, Schedule

HEAP_ALIGNMENT = 64


class Heaps(Protocol):
    """The part of `PeerMemory` that landings need."""

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]: ...
    def is_mapped(self, rank: int) -> bool: ...
    def allocate(self, nbytes: int) -> torch.Tensor: ...
    def peer(self, rank: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Put:
    """One message on its way into a peer's heap.

    `batch` writes it there; where the heap cannot be mapped, it packs `packed`, uint8 in this rank's heap, which then
    travels as a whole to byte `offset` of the peer's.
    """

    batch: CopyBatch
    packed: torch.Tensor | None = None
    offset: int = 0


class ReceiveBuffers(Protocol):
    """`window`: messages of a pair that may be under way, or None where a run is granted as a whole."""

    window: int | None

    @property
    def staging_bytes(self) -> int: ...
    def attach(self, heaps: Heaps, framed: Schedule) -> None:
        """Allocate, and learn where peers want their messages. Collective."""
        ...

    def puts(self, channel: Channel, source: LocalWeights) -> list[Put]:
        """For each message, what brings it from this rank's weights into the peer's heap."""
        ...

    def takes(self, channel: Channel) -> list[CopyBatch]:
        """For each message, the copies from this rank's heap into its weights."""
        ...

    def follow(self) -> None:
        """Bring weights whose storage has moved back to where peers write them, if they write them there."""
        ...

    def release(self) -> None:
        """Let go of the heap; weights that live there get memory of their own."""
        ...


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a peer takes messages: its ring begins at byte `start` of its heap.

    `ring` is that ring, mapped; or None, and every message for the peer is packed in `outgoing`, one slot here.
    """

    start: int
    ring: torch.Tensor | None
    outgoing: torch.Tensor | None


class RingBuffers:
    """`window` slots of `slot_bytes` for each source; message n of all runs uses slot n mod `window`.

    `put_programs` bounds the programs of a copy kernel that writes to a peer, where given.
    """

    def __init__(
        self, destination: LocalWeights | None, window: int, slot_bytes: int, put_programs: int | None = None
    ) -> None:
        self.window: int | None = window
        self.staging_bytes = 0
        self._num_slots = window
        self._slot_bytes = slot_bytes
        self._destination = destination
        self._put_programs = put_programs

    def attach(self, heaps: Heaps, framed: Schedule) -> None:
        sources = [channel.source for channel in framed.receives]
        ring_bytes = self._num_slots * self._slot_bytes
        starts = {source: ring_bytes * number for number, source in enumerate(sources)}
        targets = [channel.destination for channel in framed.sends]
        staged = [target for target in targets if not heaps.is_mapped(target)]
        outgoing_start = len(sources) * ring_bytes
        self.staging_bytes = outgoing_start + len(staged) * self._slot_bytes
        heap = heaps.allocate(self.staging_bytes)
        self._own = {source: heap[start : start + ring_bytes] for source, start in starts.items()}
        self._targets = {}
        for target, their_starts in heaps.exchange(starts, targets).items():
            start = their_starts[framed.rank]
            if target in staged:
                place = outgoing_start + staged.index(target) * self._slot_bytes
                self._targets[target] = _Target(start, None, heap[place : place + self._slot_bytes])
            else:
                self._targets[target] = _Target(start, heaps.peer(target)[start : start + ring_bytes], None)

    def puts(self, channel: Channel, source: LocalWeights) -> list[Put]:
        target = self._targets[channel.destination]
        return [self._put(number, message, target, source) for number, message in enumerate(channel.messages)]

    def takes(self, channel: Channel) -> list[CopyBatch]:
        assert self._destination is not None
        ring = self._own[channel.source]
        return [
            CopyBatch(unpack_copies(m, self._destination, self._slot(ring, n))) for n, m in enumerate(channel.messages)
        ]

    def follow(self) -> None:
        pass

    def release(self) -> None:
        self._own, self._targets = {}, {}

    def _put(self, number: int, message: Message, target: _Target, source: LocalWeights) -> Put:
        if target.ring is not None:
            copies = pack_copies(message, source, self._slot(target.ring, number))
            return Put(CopyBatch(copies, num_programs=self._put_programs))
        assert target.outgoing is not None
        packed = target.outgoing[: message.nbytes]
        return Put(CopyBatch(pack_copies(message, source, packed)), packed, target.start + self._slot_start(number))

    def _slot(self, ring: torch.Tensor, number: int) -> torch.Tensor:
        start = self._slot_start(number)
        return ring[start : start + self._slot_bytes]

    def _slot_start(self, number: int) -> int:
        return number % self._num_slots * self._slot_bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a shard lies in its rank's heap: first element at byte `offset`, `strides` in elements."""

    tensor: TensorSpec
    box: Box
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]


class DirectBuffers:
    """The destination's weights move into its heap, so that the source's write is the last copy.

    While they move, in `attach`, both their old and their new memory are taken; afterwards nothing is beyond the
    models.
    """

    window: int | None = None
    staging_bytes = 0

    def __init__(self, destination: LocalWeights | None, put_programs: int | None = None) -> None:
        """`put_programs`: see `RingBuffers`."""
        self._destination = destination
        self._put_programs = put_programs
        self._homes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, heaps: Heaps, framed: Schedule) -> None:
        owners = [] if self._destination is None else _distinct_owners(self._destination)
        sizes = [-(-_span_bytes(owner) // HEAP_ALIGNMENT) * HEAP_ALIGNMENT for owner in owners]
        heap = heaps.allocate(sum(sizes))
        start = 0
        for owner, size in zip(owners, sizes, strict=True):
            self._homes.append((owner, _strided(heap, owner.dtype, start, owner.size(), owner.stride())))
            start += size
        self._move_home()
        places = [] if self._destination is None else [_place(shard, heap) for shard in self._destination]
        targets = [channel.destination for channel in framed.sends]
        found = heaps.exchange(places, targets)
        # A message is many pieces of many weights: no single put could carry it to a heap that is not mapped.
        assert all(heaps.is_mapped(target) for target in targets)
        self._peers = {target: _peer_weights(heaps.peer(target), found[target]) for target in targets}

    def puts(self, channel: Channel, source: LocalWeights) -> list[Put]:
        target = self._peers[channel.destination]
        return [
            Put(
                CopyBatch(
                    (
                        copy
                        for piece in message.pieces
                        for copy in weight_copies(piece.tensor, piece.box, source, target)
                    ),
                    num_programs=self._put_programs,
                )
            )
            for message in channel.messages
        ]

    def takes(self, channel: Channel) -> list[CopyBatch]:
        return [CopyBatch(()) for _ in channel.messages]

    def follow(self) -> None:
        self._move_home()

    def release(self) -> None:
        self._peers = {}
        for owner, home in self._homes:
            if owner.data_ptr() == home.data_ptr():
                owner.data = home.clone()
        self._homes = []
        if self._destination is not None:
            self._destination.refresh()

    def _move_home(self) -> None:
        """Bring every weight that lies elsewhere into the heap, contents and all."""
        moved = [(owner, home) for owner, home in self._homes if owner.data_ptr() != home.data_ptr()]
        for owner, home in moved:
            home.copy_(owner.detach())
            owner.data = home
        if moved and self._destination is not None:
            self._destination.refresh()


def _distinct_owners(memory: LocalWeights) -> list[torch.Tensor]:
    """Raises RefitError where two of them overlap: giving each memory of its own would part what the model shares."""
    owners = list({id(shard.owner): shard.owner for shard in memory}.values())
    ordered = sorted(owners, key=lambda owner: owner.data_ptr())
    for before, after in itertools.pairwise(ordered):
        if before.data_ptr() + _span_bytes(before) > after.data_ptr():
            raise RefitError("two weights share memory, which direct buffers would part: use --nvshmem-buffers ring")
    return owners


def _span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _strided(
    heap: torch.Tensor, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    first = heap[offset:]
    whole = first[: first.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return torch.as_strided(whole, shape, strides, whole.storage_offset())


def _place(shard: LocalShard, heap: torch.Tensor) -> _Place:
    view = shard.view
    return _Place(shard.tensor, shard.box, view.dtype, view.data_ptr() - heap.data_ptr(), view.stride())


def _peer_weights(heap: torch.Tensor, places: Sequence[_Place]) -> LocalWeights:
    return LocalWeights(
        LocalShard(p.tensor, p.box, heap, _strided(heap, p.dtype, p.offset, p.box.extents, p.strides)) for p in places
    )
