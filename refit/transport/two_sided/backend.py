"""The protocol between the two-sided executor and the libraries that send and receive its messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from refit.copies.batch import CopyBatch
from refit.memory.streams import new_stream
from refit.transport.packing import PackBatch, UnpackBatch


@dataclass(frozen=True, slots=True)
class BackendTraits:
    """How a backend wants its messages.

    Pieces of at least `direct_send_threshold` bytes are messages of their own; no message exceeds `bucket_bytes`.
    At most `slots_per_peer` staged messages of a pair and `window` rounds are in flight; a message that needs no
    staging takes no slot. `copies` is the number of buffers per slot. `num_programs` limits the share of a GPU that
    packing and unpacking take from the backend's own kernels; None is no limit. `packed_bytes` takes the place of
    `bucket_bytes` for messages that an encoding packs; None: they are no longer.
    """

    direct_send_threshold: int | None
    bucket_bytes: int
    slots_per_peer: int
    window: int
    copies: int = 1
    num_programs: int | None = None
    packed_bytes: int | None = None

    def most_bytes(self, *, is_packed: bool) -> int:
        """The most of a message. Both ends of a pair give the same: `is_packed` is of the wire, not of a rank."""
        return self.packed_bytes if is_packed and self.packed_bytes is not None else self.bucket_bytes


@dataclass(slots=True)
class BoundMessage:
    """One message bound to this rank's memory.

    `buffer` (uint8, contiguous, on the weights' device) is sent or received into: the weights themselves, or a slot
    that `batch` packs or unpacks. A message that an encoding packs may be shorter than its buffer. `batch` also has the
    hooks of the weights. `host` is the slot's copy in pinned memory where the backend cannot read the device. `reuses`
    is the round that used the slot before, -1 for none.
    """

    peer: int
    buffer: torch.Tensor
    batch: CopyBatch | None
    host: torch.Tensor | None = None
    reuses: int = -1

    @property
    def filled_bytes(self) -> int:
        """Of the buffer of a message to be sent, what is to be sent once it is packed.

        On a GPU, where an encoding has packed it: waits for the current stream.
        """
        return self.batch.moved_bytes if isinstance(self.batch, PackBatch) else self.buffer.numel()

    @property
    def arrived_bytes(self) -> int:
        """Of the buffer of a message that has arrived in `host`, what the sender has filled.

        Raises RefitError where the header says what cannot be.
        """
        assert self.host is not None
        return self.batch.told_bytes(self.host) if isinstance(self.batch, UnpackBatch) else self.buffer.numel()


Exchange = Callable[[Sequence[BoundMessage], Sequence[BoundMessage]], None]
"""Sends and receives the buffers of messages, and waits on the host until they have arrived."""


def cut_to_length(
    sends: Sequence[BoundMessage], receives: Sequence[BoundMessage], exchange: Exchange
) -> tuple[list[BoundMessage], list[BoundMessage]]:
    """The messages of a round with buffers as long as what is sent, for a backend whose two ends must give one length.

    An encoding packs its messages to lengths that only their senders know. They tell them with `exchange`, all of a
    round at once; a round without such messages exchanges nothing. It waits for the peers' work of the same round, so
    the executor's argument holds: nobody waits for a later one. Raises RefitError where a length cannot be.
    """
    packed = [bound.batch for bound in (*sends, *receives) if isinstance(bound.batch, PackBatch | UnpackBatch)]
    if packed:
        exchange(
            [_length_of(bound) for bound in sends if isinstance(bound.batch, PackBatch)],
            [_length_of(bound) for bound in receives if isinstance(bound.batch, UnpackBatch)],
        )
    return [_cut(bound) for bound in sends], [_cut(bound) for bound in receives]


def _length_of(bound: BoundMessage) -> BoundMessage:
    assert isinstance(bound.batch, PackBatch | UnpackBatch)
    return BoundMessage(bound.peer, bound.batch.length.view(torch.uint8), None)


def _cut(bound: BoundMessage) -> BoundMessage:
    if isinstance(bound.batch, PackBatch | UnpackBatch):
        return BoundMessage(bound.peer, bound.buffer[: bound.batch.checked_bytes()], None)
    return bound


@dataclass(slots=True)
class PendingRound:
    """The messages of one round, and what to wait for until they are done."""

    sends: Sequence[BoundMessage]
    receives: Sequence[BoundMessage]
    send_works: list[dist.Work] = field(default_factory=list)
    receive_works: list[dist.Work] = field(default_factory=list)
    unpacked: torch.cuda.Event | None = None

    @property
    def peers(self) -> set[int]:
        return {bound.peer for bound in (*self.sends, *self.receives)}


class P2PBackend(Protocol):
    """The steps of one round, in the order in which the executor calls them. `begin` and `finish` enclose a run.

    A backend on CUDA streams only enqueues: `wait_sent` and `wait_received` then order streams, and `finish` waits for
    the device. All steps raise RefitError, naming the peer, where a peer fails or time runs out.
    """

    traits: BackendTraits

    def begin(self) -> None:
        """Open a run."""
        ...

    def wait_sent(self, pending: PendingRound) -> None:
        """Wait until the send buffers of a round may be written again."""
        ...

    def pack(self, sends: Sequence[BoundMessage]) -> None:
        """Copy staged messages from the weights into their slots."""
        ...

    def post(self, pending: PendingRound, reused: PendingRound | None) -> None:
        """Start the receives and sends of a round. `reused` is the last round that used one of its slots."""
        ...

    def wait_received(self, pending: PendingRound) -> None:
        """Wait until the messages of a round have arrived."""
        ...

    def unpack(self, pending: PendingRound) -> None:
        """Copy staged messages of a round from their slots into the weights."""
        ...

    def copy_local(self, batch: CopyBatch) -> None:
        """Run copies that stay on this rank."""
        ...

    def finish(self, rounds: Sequence[PendingRound]) -> None:
        """Wait until the copies and messages of all rounds have ended."""
        ...


class Streams:
    """The CUDA streams of a backend: one each for packing, transfers, unpacking and local copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pack, self.transfer, self.unpack, self.local = (new_stream(device) for _ in range(4))

    def begin(self) -> None:
        """Order all streams after the work of the caller's stream, which may still be writing the weights."""
        for stream in (self.pack, self.transfer, self.unpack, self.local):
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait on the host until the work of all streams has ended."""
        for stream in (self.pack, self.transfer, self.unpack, self.local):
            torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.current_stream(self.device).synchronize()
