"""The messages that each pair of ranks exchanges: a pure function of the plan, so that both ends derive the same ones.

1. The transfers of a pair, in plan order, are cut into pieces that lie within one tensor in memory at both ends
   (stacked tensors: one piece per index of dim 0).
2. A large piece is a message of its own. An end where it is contiguous sends from, or receives into, the weights
   directly; another end stages it. Each end decides that for itself, since the bytes sent are the same.
3. The other pieces are packed one after another into buckets; each bucket is a message.

No message exceeds the bucket size: larger pieces are cut along their leading dim. `schedule` says when each goes.

Messages that an encoding packs are buckets too. They hold as many pieces as fit at their most bytes, so both ends know
which these are. How long a message is in a run is in its header (`transport.packing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refit.errors import UsageError
from refit.memory.phases import PhaseClock
from refit.memory.weights import Part
from refit.plan.box import Box
from refit.plan.cost import bytes_matrix, wire_only
from refit.plan.plan import RankPlan, RefitPlan, Transfer
from refit.plan.sharding import TensorSpec
from refit.plan.wire import MaxBytes
from refit.transport.base import RunReport
from refit.transport.onward import Hops

ALIGNMENT = 16
"""Pieces start at multiples of this in a bucket: any dtype can be viewed there, and GPUs can load 16 bytes at once."""

MIN_BUCKET_BYTES = 256

HEADER_BYTES = ALIGNMENT
"""In front of a message that an encoding packs: its length, as int64, and a gap, so that what follows is aligned."""


@dataclass(frozen=True, slots=True)
class Framing:
    """How transfers are divided into messages. Both ends must use equal values.

    Pieces of at least `direct_send_threshold` bytes are messages of their own; None packs all pieces into buckets.
    `pair_bytes` are the bucket sizes of (source, destination) pairs where they differ; none exceeds `bucket_bytes`.
    `max_bytes` is for messages that an encoding packs, which are all buckets.
    """

    bucket_bytes: int
    direct_send_threshold: int | None
    pair_bytes: Mapping[tuple[int, int], int] | None = None
    max_bytes: MaxBytes | None = None

    def of_pair(self, source: int, destination: int) -> Framing:
        if self.pair_bytes is None:
            return self
        return replace(self, bucket_bytes=self.pair_bytes[source, destination], pair_bytes=None)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one tensor in a message, from byte `offset` on, in the destination's dtype."""

    tensor: TensorSpec
    box: Box
    offset: int

    @property
    def nbytes(self) -> int:
        return self.box.volume * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces that are sent together, as `nbytes` bytes, or as at most `max_bytes` where an encoding packs them.

    In `stage` 0 they are read in the source's weights, later in the destination's. `step` orders the messages of all
    ranks (`schedule`). Where an encoding packs it, its receiver and those behind it pass it on over `hops`; one that is
    itself passed on `passes_on` the message that its sender got from this rank in this step.
    """

    pieces: tuple[Piece, ...]
    nbytes: int
    max_bytes: int | None = None
    stage: int = 0
    step: int = 0
    hops: Hops = frozenset()
    passes_on: tuple[int, int] | None = None

    def at(self, stage: int, step: int) -> Message:
        """The same message in that stage and step. There are thousands: `replace` takes four times as long."""
        return Message(self.pieces, self.nbytes, self.max_bytes, stage, step, self.hops, self.passes_on)

    @property
    def buffer_bytes(self) -> int:
        """What the message takes in a buffer, with the header where it has one."""
        return self.nbytes if self.max_bytes is None else HEADER_BYTES + self.max_bytes

    @property
    def tensor_boxes(self) -> list[tuple[TensorSpec, Box]]:
        """Its pieces, without their places in the message."""
        return [(piece.tensor, piece.box) for piece in self.pieces]

    @property
    def parts(self) -> Iterator[Part]:
        """What it holds."""
        return ((piece.tensor.key, piece.box) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Channel:
    """All messages from `source` to `destination`, in the order in which they are sent."""

    source: int
    destination: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything one rank does in a run. Channels are in the order of the peers' ranks."""

    rank: int
    sends: tuple[Channel, ...]
    receives: tuple[Channel, ...]
    local: tuple[Transfer, ...]
    zeros: tuple[Transfer, ...]
    totals: Totals

    def report(self, clock: PhaseClock) -> RunReport:
        """The report of a run that `clock` has timed."""
        return RunReport(
            phases_s=dict(clock.phases_s),
            wire_bytes_sent=self.totals.sent_bytes,
            wire_bytes_received=self.totals.received_bytes,
            local_bytes=self.totals.local_bytes,
            most_wire_bytes_sent=self.totals.sent_bytes,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes of weights that one rank moves in one run, without the alignment gaps in buckets."""

    sent_bytes: int
    received_bytes: int
    local_bytes: int

    @classmethod
    def of(cls, part: RankPlan) -> Totals:
        return cls(*(sum(transfer.nbytes for transfer in kind) for kind in (part.sends, part.receives, part.local)))


def num_peers(plan: RefitPlan) -> int:
    """The largest number of peers that any rank sends to, or receives from; at least 1."""
    pairs = wire_only(bytes_matrix(plan)) > 0
    return max(1, int(pairs.sum(axis=0).max()), int(pairs.sum(axis=1).max()))


def bucket_bytes(plan: RefitPlan, staging_bytes: int, slots_per_peer: int, limit: int) -> int:
    """The bucket size, at most `limit`, at which every rank's buckets fit into `staging_bytes`.

    A rank needs `slots_per_peer` buckets for each of its peers. Raises UsageError where that leaves less than
    MIN_BUCKET_BYTES for a bucket.
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
    """The bucket size of each (source, destination) pair, at most `limit`.

    At either end, a pair's share of `staging_bytes` is proportional to the bytes it moves, and the smaller share
    counts. A rank that both sends and receives spends half on each. Pairs then need about equally many messages, so
    that the rounds of a rank stay full to the end. Raises UsageError as `bucket_bytes` does.
    """
    bucket_bytes(plan, staging_bytes // 2, slots_per_peer, limit)
    matrix = wire_only(bytes_matrix(plan))
    sources, destinations = np.nonzero(matrix)
    moved, sent, received = matrix[sources, destinations], matrix.sum(axis=1), matrix.sum(axis=0)
    allowed = staging_bytes // np.where((sent > 0) & (received > 0), 2, 1) // slots_per_peer
    allowed -= num_peers(plan) * MIN_BUCKET_BYTES
    shares = np.minimum(
        allowed[sources] * (moved / sent[sources]), allowed[destinations] * (moved / received[destinations])
    )
    sizes = np.minimum(limit, MIN_BUCKET_BYTES + shares).astype(np.int64) // ALIGNMENT * ALIGNMENT
    return dict(zip(zip(sources.tolist(), destinations.tolist(), strict=True), sizes.tolist(), strict=True))


def even_framing(plan: RefitPlan, message_bytes: int) -> Framing:
    """Messages of up to about `message_bytes`, about equally many for every pair.

    Each round of messages is then the whole refit in small: an order of destinations that is good for the whole is good
    for every round, and no pair ends long before the others.
    """
    matrix = wire_only(bytes_matrix(plan))
    num_messages = max(1, -(-int(matrix.max()) // message_bytes))
    sizes = {
        (source, destination): max(MIN_BUCKET_BYTES, -(-int(matrix[source, destination]) // num_messages))
        for source, destination in np.argwhere(matrix).tolist()
    }
    return Framing(max(sizes.values(), default=message_bytes), None, sizes)


def messages_of(transfers: Iterable[Transfer], framing: Framing) -> Iterator[Message]:
    """The messages of one pair's transfers, in their order."""
    if framing.max_bytes is not None:
        yield from packed_messages(
            (
                (transfer.tensor, box, frozenset())
                for transfer in transfers
                for box in transfer.tensor.memory_boxes(transfer.box)
            ),
            framing,
        )
        return
    open_bucket = _Bucket(framing.bucket_bytes)
    for transfer in transfers:
        tensor = transfer.tensor
        for box in tensor.memory_boxes(transfer.box):
            if (
                framing.direct_send_threshold is not None
                and box.volume * tensor.itemsize >= framing.direct_send_threshold
            ):
                yield from _sent_directly(tensor, box, framing.bucket_bytes)
            else:
                yield from open_bucket.add(tensor, box)
    yield from open_bucket.flush()


def _sent_directly(tensor: TensorSpec, box: Box, limit: int) -> Iterator[Message]:
    """`box` as messages of at most `limit` bytes.

    It is cut along its leading dim, so that the parts are contiguous wherever the whole is.
    """
    pending = [box]
    while pending:
        part = pending.pop()
        nbytes = part.volume * tensor.itemsize
        if nbytes <= limit:
            yield Message((Piece(tensor, part, 0),), nbytes)
        else:
            pending += reversed(list(part.split(-(-nbytes // limit))))


def packed_messages(boxes: Iterable[tuple[TensorSpec, Box, Hops]], framing: Framing) -> Iterator[Message]:
    """Messages that an encoding packs: of as many boxes with equal hops as fit at their most bytes."""
    limit, max_bytes = framing.bucket_bytes - HEADER_BYTES, framing.max_bytes
    assert max_bytes is not None
    open_messages: dict[Hops, tuple[list[Piece], int]] = {}
    for tensor, whole, hops in boxes:
        for box in _within(tensor, whole, limit, max_bytes):
            pieces, most = open_messages.pop(hops, ([], 0))
            needed = max_bytes(tensor, box)
            if most + needed > limit:
                yield _packed(pieces, most, hops)
                pieces, most = [], 0
            pieces.append(Piece(tensor, box, 0))
            open_messages[hops] = (pieces, most + needed)
    for hops, (pieces, most) in open_messages.items():
        yield _packed(pieces, most, hops)


def _packed(pieces: Sequence[Piece], max_bytes: int, hops: Hops) -> Message:
    return Message(tuple(pieces), sum(piece.nbytes for piece in pieces), max_bytes, hops=hops)


def _within(tensor: TensorSpec, box: Box, limit: int, max_bytes: MaxBytes) -> Iterator[Box]:
    """`box`, cut along leading dims until each part takes at most `limit` bytes."""
    pending = [box]
    while pending:
        part = pending.pop()
        needed = max_bytes(tensor, part)
        if needed <= limit:
            yield part
        else:
            assert part.volume > 1, f"one element of {tensor.key} takes {needed} bytes, a message {limit}"
            pending += reversed(list(part.split(-(-needed // limit))))


class _Bucket:
    """Collects pieces, and yields a message whenever the next piece does not fit."""

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
    """Cut `box`, which exceeds `limit` elements, in two along its leading dim.

    The first part fits into `room` elements where `room` is at least a quarter of `limit`, else into `limit`, as far
    as whole rows allow.
    """
    dim = box.leading_dim
    assert dim is not None
    row = box.volume // box.extents[dim]
    rows = (room if room >= limit // 4 else limit) // row
    middle = box.offsets[dim] + min(max(rows, 1), box.extents[dim] - 1)
    return [box.narrow(dim, box.offsets[dim], middle), box.narrow(dim, middle, box.ends[dim])]
