"""Sources write the destination's weights where they are: nothing is staged, and no weight moves for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from refit.copies.batch import CopyBatch, weight_copies
from refit.copies.copy import Copy
from refit.memory.weights import LocalWeights
from refit.transport.messages import Channel, Message, Schedule
from refit.transport.one_sided.peer_memory import Counter, PeerMemory, Put
from refit.transport.one_sided.places import Place, all_bytes, mapped_weights, place_of


class SharedStorages(PeerMemory, Protocol):
    """Peer memory whose substrate maps memory that others have allocated."""

    def share(self, region: torch.Tensor, peers: Sequence[int]) -> dict[int, Any]:
        """Peer -> a handle, to be pickled, by which it can map `region`, uint8, a whole storage of this rank."""
        ...

    def map(self, handles: Sequence[Any]) -> list[torch.Tensor]:
        """The regions behind the handles of a peer, as uint8 that this rank can write."""
        ...

    def publish(self, key: str, value: Any) -> None:
        """See `Rendezvous.publish`."""
        ...

    def fetch(self, rank: int, key: str) -> Any:
        """See `Rendezvous.fetch`."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """What a destination tells its sources: of each of its storages a handle per source, and where its shards lie."""

    handles: tuple[dict[int, Any], ...]
    places: tuple[Place, ...]


class InPlaceBuffers:
    """The destination's own weights, mapped by the sources. Weights with new storage are mapped again.

    A destination with moved weights publishes a new offer and raises MOVED before it gives credit, so that a source
    with credit knows of every move that concerns the run.
    """

    window: int | None = None
    keeps_order = True
    staging_bytes = 0

    def __init__(
        self,
        memory: SharedStorages,
        schedule: Schedule,
        destination: LocalWeights | None,
        engine_bytes: int | None,
        put_programs: int | None = None,
        near: Collection[int] = (),
    ) -> None:
        """`engine_bytes`: see `CopyBatch`. `put_programs`: see `RingBuffers`. Neither holds for peers that are `near`,
        in the same memory: no link limits copies there. Collective: every rank of `memory`."""
        self._memory = memory
        self._destination = destination
        self._engine_bytes = engine_bytes
        self._put_programs = put_programs
        self._near = near
        self._sources = [channel.source for channel in schedule.receives]
        self._num_offers = 0
        targets = [channel.destination for channel in schedule.sends]
        offers = memory.exchange(self._offer(), targets)
        self._peers = {target: self._mapped(offers[target]) for target in targets}
        self._num_seen = dict.fromkeys(targets, 0)

    def credit(self, channel: Channel, position: int) -> int:
        return len(channel.messages)

    def puts(self, channel: Channel, read_by: Callable[[Message], LocalWeights]) -> list[Put]:
        peer, is_near = self._peers[channel.destination], channel.destination in self._near
        return [
            Put(
                CopyBatch(
                    _copies(message, read_by(message), peer),
                    engine_bytes=None if is_near else self._engine_bytes,
                    num_programs=None if is_near else self._put_programs,
                )
            )
            for message in channel.messages
        ]

    def weights_of(self, peer: int) -> LocalWeights | None:
        return self._peers[peer]

    def unpack_batches(self, channel: Channel) -> list[CopyBatch]:
        return [CopyBatch(()) for _ in channel.messages]

    def rebind(self) -> None:
        """Offer weights with new storage to the sources."""
        if self._destination is None or self._destination.generation == self._offered:
            return
        self._num_offers += 1
        self._memory.publish(_key(self._num_offers), self._offer())
        for source in self._sources:
            self._memory.raise_counter(source, Counter.MOVED, self._num_offers)

    def has_moved(self, peer: int) -> bool:
        newest = self._num_seen[peer]
        while self._memory.reached(peer, Counter.MOVED, newest + 1):
            newest += 1
        if newest == self._num_seen[peer]:
            return False
        self._num_seen[peer] = newest
        self._peers[peer] = self._mapped(self._memory.fetch(peer, _key(newest)))
        return True

    def release(self) -> None:
        self._peers = {}

    def _offer(self) -> Offer:
        """The present storages of this rank's destination weights. Ranks without such weights offer nothing."""
        if self._destination is None or not self._sources:
            self._offered = 0 if self._destination is None else self._destination.generation
            return Offer((), ())
        self._offered = self._destination.generation
        regions: list[torch.Tensor] = []
        numbers: dict[int, int] = {}
        places = []
        for shard in self._destination:
            storage = shard.view.untyped_storage()
            number = numbers.setdefault(storage.data_ptr(), len(regions))
            if number == len(regions):
                regions.append(all_bytes(storage))
            places.append(place_of(shard, regions[number], number))
        return Offer(tuple(self._memory.share(region, self._sources) for region in regions), tuple(places))

    def _mapped(self, offer: Offer) -> LocalWeights:
        return mapped_weights(self._memory.map([handles[self._memory.rank] for handles in offer.handles]), offer.places)


def _copies(message: Message, source: LocalWeights, peer: LocalWeights) -> Iterator[Copy]:
    for piece in message.pieces:
        yield from weight_copies(piece.tensor, piece.box, source, peer)


def _key(number: int) -> str:
    return f"moved/{number}"
