"""Which messages each pair of ranks exchanges: a pure function of the plan, so that both ends derive the same.

1. A pair's transfers, in plan order, are cut into pieces that lie within one tensor in memory at either end
   (stacked tensors: one piece per index of dim 0).
2. A large piece travels alone: an end where it is one run of memory sends from or receives into the weights, any other
   stages it. Which of the two an end does is its own affair, the bytes on the wire are the same.
3. All others are laid one behind the other into buckets.

No message is larger than a bucket: larger pieces are cut, along their leading dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refit.errors import UsageError
from refit.plan.box import Box
from refit.plan.cost import bytes_matrix
from refit.plan.plan import IntArray, RankPlan, RefitPlan, Transfer
from refit.plan.sharding import TensorSpec
from refit.transport.base import RunReport
from refit.transport.phases import PhaseClock

ALIGNMENT = 16
"""Pieces start at multiples of this in a bucket: every dtype can be viewed there, and GPUs load 16 bytes at once."""

MIN_BUCKET_BYTES = 256


@dataclass(frozen=True, slots=True)
class Framing:
    """How transfers become messages. Both ends must use equal values.

    Pieces of at least `direct_send_threshold` travel alone; None puts all into buckets. `pair_bytes` are the buckets of
    each (source, destination) pair where they differ, none above `bucket_bytes`.
    """

    bucket_bytes: int
    direct_send_threshold: int | None
    pair_bytes: Mapping[tuple[int, int], int] | None = None

    def of_pair(self, source: int, destination: int) -> Framing:
        if self.pair_bytes is None:
            return self
        return Framing(self.pair_bytes[source, destination], self.direct_send_threshold)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one tensor, at byte `offset` of its message, in the destination's dtype."""

    tensor: TensorSpec
    box: Box
    offset: int

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes sent at once."""

    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Channel:
    """All messages from `source` to `destination`, in the order they travel."""

    source: int
    destination: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one rank does; channels in the order of the peers' ranks."""

    rank: int
    sends: tuple[Channel, ...]
    receives: tuple[Channel, ...]
    local: tuple[Transfer, ...]
    zeros: tuple[Transfer, ...]
    totals: Totals

    def report(self, clock: PhaseClock) -> RunReport:
        return RunReport(
            dict(clock.phases_s), self.totals.sent_bytes, self.totals.received_bytes, self.totals.local_bytes
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes of weights that one rank moves in one run, without the gaps that alignment leaves in buckets."""

    sent_bytes: int
    received_bytes: int
    local_bytes: int

    @classmethod
    def of(cls, part: RankPlan) -> Totals:
        return cls(*(sum(transfer.nbytes for transfer in some) for some in (part.sends, part.receives, part.local)))


def num_peers(plan: RefitPlan) -> int:
    """The largest number of peers that any rank sends to, or receives from; at least 1."""
    pairs = _wire_matrix(plan) > 0
    return max(1, int(pairs.sum(axis=0).max()), int(pairs.sum(axis=1).max()))


def _wire_matrix(plan: RefitPlan) -> IntArray:
    """Bytes from each rank (row) to each other rank (column)."""
    matrix = bytes_matrix(plan)
    np.fill_diagonal(matrix, 0)
    return matrix


def bucket_bytes(plan: RefitPlan, staging_bytes: int, slots_per_peer: int, limit: int) -> int:
    """The bucket size at which `slots_per_peer` buckets for each peer of the busiest rank fit into `staging_bytes`.

    Raises UsageError where that leaves too little to hold a piece.
    """
    slots = slots_per_peer * num_peers(plan)
    size = min(limit, staging_bytes // slots) // ALIGNMENT * ALIGNMENT
    if size < MIN_BUCKET_BYTES:
        raise UsageError(
            f"{staging_bytes} bytes of staging leave {size} for each of {slots} buckets, at least {MIN_BUCKET_BYTES} "
            f"are needed: raise --staging-mib to {slots * MIN_BUCKET_BYTES / 2**20:.3f} or more"
        )
    return size


def pair_buckets(plan: RefitPlan, staging_bytes: int, slots_per_peer: int, limit: int) -> dict[tuple[int, int], int]:
    """The bucket size of each (source, destination) pair, its share of `staging_bytes` at either end going by its
    bytes.

    A rank that both sends and receives spends half on each. Pairs then end after about as many messages as one another,
    and a rank's rounds stay full to the end. Raises UsageError as `bucket_bytes` does.
    """
    bucket_bytes(plan, staging_bytes // 2, slots_per_peer, limit)
    matrix = _wire_matrix(plan)
    sources, destinations = np.nonzero(matrix)
    moved, sent, received = matrix[sources, destinations], matrix.sum(axis=1), matrix.sum(axis=0)
    allowed = staging_bytes // np.where((sent > 0) & (received > 0), 2, 1) // slots_per_peer
    allowed -= num_peers(plan) * MIN_BUCKET_BYTES
    shares = np.minimum(
        allowed[sources] * (moved / sent[sources]), allowed[destinations] * (moved / received[destinations])
    )
    sizes = np.minimum(limit, MIN_BUCKET_BYTES + shares).astype(np.int64) // ALIGNMENT * ALIGNMENT
    return dict(zip(zip(sources.tolist(), destinations.tolist(), strict=True), sizes.tolist(), strict=True))


def schedule(plan: RefitPlan, rank: int, framing: Framing) -> Schedule:
    """What `rank` sends, receives and copies under `plan`."""
    part = plan.for_rank(rank)
    sends, receives = _channels(part.sends, framing), _channels(part.receives, framing)
    return Schedule(rank, sends, receives, part.local, part.zeros, Totals.of(part))


def _channels(transfers: Iterable[Transfer], framing: Framing) -> tuple[Channel, ...]:
    by_pair: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        by_pair[transfer.source, transfer.destination].append(transfer)
    return tuple(Channel(*pair, tuple(_messages(by_pair[pair], framing.of_pair(*pair)))) for pair in sorted(by_pair))


def _messages(transfers: Sequence[Transfer], framing: Framing) -> Iterator[Message]:
    open_bucket = _Bucket(framing.bucket_bytes)
    for transfer in transfers:
        tensor = transfer.tensor
        for box in memory_boxes(tensor, transfer.box):
            if (
                framing.direct_send_threshold is not None
                and box.volume * tensor.itemsize >= framing.direct_send_threshold
            ):
                yield from _sent_directly(tensor, box, framing.bucket_bytes)
            else:
                yield from open_bucket.add(tensor, box)
    yield from open_bucket.flush()


def memory_boxes(tensor: TensorSpec, box: Box) -> Iterator[Box]:
    """`box`, cut where memory is: one box per index of dim 0 of a stacked tensor."""
    if not tensor.stacked or box.extents[0] == 1:
        yield box
        return
    for index in range(box.offsets[0], box.ends[0]):
        yield box.narrow(0, index, index + 1)


def _sent_directly(tensor: TensorSpec, box: Box, limit: int) -> Iterator[Message]:
    """Parts cut along the leading dim are runs of memory wherever the whole is one."""
    pending = [box]
    while pending:
        part = pending.pop()
        nbytes = part.volume * tensor.itemsize
        if nbytes <= limit:
            yield Message((Piece(tensor, part, 0),), nbytes)
        else:
            pending += reversed(list(part.split(-(-nbytes // limit))))


class _Bucket:
    """Collects pieces and gives a message whenever the next does not fit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[Piece] = []
        self._end = 0

    def add(self, tensor: TensorSpec, box: Box) -> Iterator[Message]:
        pending = [box]
        while pending:
            part = pending.pop()
            nbytes = part.volume * tensor.itemsize
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            if start + nbytes <= self._limit:
                self._pieces.append(Piece(tensor, part, start))
                self._end = start + nbytes
            elif nbytes > self._limit:
                pending += reversed(
                    _cut(part, max(1, (self._limit - start) // tensor.itemsize), self._limit // tensor.itemsize)
                )
            else:
                yield from self.flush()
                pending.append(part)

    def flush(self) -> Iterator[Message]:
        if self._pieces:
            yield Message(tuple(self._pieces), self._end)
            self._pieces, self._end = [], 0


def _cut(box: Box, room: int, limit: int) -> list[Box]:
    """`box`, of more than `limit` elements, in two: first what fits into `room` elements, if that is worth a piece."""
    dim = box.leading_dim
    assert dim is not None
    row = box.volume // box.extents[dim]
    rows = (room if room >= limit // 4 else limit) // row
    middle = box.offsets[dim] + min(max(rows, 1), box.extents[dim] - 1)
    return [box.narrow(dim, box.offsets[dim], middle), box.narrow(dim, middle, box.ends[dim])]
