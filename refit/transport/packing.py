"""How a message gets from weights into a buffer, and from there into weights: by copies, or by an encoding.

A message of fixed length is its pieces one after another. One that an encoding packs is a header of HEADER_BYTES with
the length of what follows, as int64, and then that. Its buffer is as long as the longest such message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy
from refit.errors import RefitError
from refit.memory.codec import Decoder, Encoder
from refit.memory.phases import PhaseClock
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights
from refit.transport.base import RunReport
from refit.transport.kept import KeptMessage, KeptMessages, KeptSend
from refit.transport.messages import HEADER_BYTES, Message, Schedule


def pack_batch(
    message: Message,
    memory: LocalWeights,
    buffer: torch.Tensor,
    num_programs: int | None = None,
    *,
    sends_all: bool = False,
) -> CopyBatch:
    """What fills `buffer`, uint8 of at least `message.buffer_bytes`, from the weights. `sends_all`: see PackBatch."""
    if message.max_bytes is None:
        return CopyBatch(pack_copies(message, memory, buffer), num_programs=num_programs)
    encoder = None if message.passes_on is not None else memory.encoder(message.tensor_boxes)
    return PackBatch(encoder, message.max_bytes, buffer, sends_all=sends_all)


def unpack_batch(
    message: Message, memory: LocalWeights, buffer: torch.Tensor, peer: int, num_programs: int | None = None
) -> CopyBatch:
    """What uses `buffer`, uint8 of at least `message.buffer_bytes`, filled by `peer`, for the weights."""
    if message.max_bytes is None:
        return CopyBatch(unpack_copies(message, memory, buffer), num_programs=num_programs)
    return UnpackBatch(memory.decoder(message.tensor_boxes), message.max_bytes, buffer, peer)


def bind_kept(kept: KeptMessages, batch: CopyBatch | None, message: Message, peer: int, *, sends: bool) -> None:
    """Let `batch`, which packs `message` to `peer` or unpacks one from it, use what is kept."""
    if isinstance(batch, PackBatch) and sends:
        batch.kept = kept.sent(message, peer)
    elif isinstance(batch, UnpackBatch):
        batch.kept = kept.received(message, peer)


def pack_copies(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> list[Copy]:
    """From the weights into `buffer`, uint8 of at least `message.nbytes`."""
    return [Copy(packed, weights) for packed, weights in _pairs(message, memory, buffer)]


def unpack_copies(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> list[Copy]:
    """From `buffer`, uint8 of at least `message.nbytes`, into the weights."""
    return [Copy(weights, packed) for packed, weights in _pairs(message, memory, buffer)]


def _pairs(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of equal shape: in the buffer, in the weights."""
    for piece in message.pieces:
        dtype: torch.dtype = getattr(torch, piece.tensor.dtype)
        packed = buffer[piece.offset : piece.offset + piece.nbytes].view(dtype).view(piece.box.extents)
        for view in memory.views(piece.tensor.key, piece.box):
            yield part_within(packed, piece.box, view.box), view.data


class _FramedBatch(CopyBatch):
    """One message with a header in `buffer`. `length`, in this rank's memory, is what it said in the last run."""

    def __init__(self, max_bytes: int, buffer: torch.Tensor) -> None:
        super().__init__(())
        self.max_bytes = max_bytes
        self.length = torch.zeros(1, dtype=torch.int64, device=buffer.device)
        self._header = buffer[:8].view(torch.int64)
        self._payload = buffer[HEADER_BYTES : HEADER_BYTES + max_bytes]

    @property
    def moved_bytes(self) -> int:
        """Those of the last run, with the header. On a GPU: waits for the current stream."""
        return HEADER_BYTES + int(self.length)

    def checked_bytes(self) -> int:
        """As `moved_bytes`. Raises RefitError where they are more than were agreed."""
        return self._checked(int(self.length))

    def _checked(self, length: int) -> int:
        """The bytes of a message of this `length`, with the header."""
        if not 0 <= length <= self.max_bytes:
            raise RefitError(self._refusal(length))
        return HEADER_BYTES + length

    def _refusal(self, length: int) -> str:
        """Why `length` cannot be."""
        raise NotImplementedError


class PackBatch(_FramedBatch):
    """Packs one message into `buffer`; without an `encoder` it is what is `kept`.

    With `sends_all` the transport sends all of the buffer, whatever the length.
    """

    kept: KeptSend | None = None

    def __init__(
        self, encoder: Encoder | None, max_bytes: int, buffer: torch.Tensor, *, sends_all: bool = False
    ) -> None:
        super().__init__(max_bytes, buffer)
        self._encoder = encoder
        self._sends_all = sends_all

    @property
    def moved_bytes(self) -> int:
        return HEADER_BYTES + self.max_bytes if self._sends_all else super().moved_bytes

    def run_pieces(self) -> None:
        """Raises RefitError where the encoding says that it has written more than was agreed."""
        super().run_pieces()
        if self._encoder is not None:
            self._encoder.pack(self._payload, self.length)
        else:
            assert self.kept is not None, "it is bound with what it passes on"
            self.kept.take(self._payload, self.length)
        if not self.length.is_cuda:  # on a GPU, reading the length would wait for the device
            self.checked_bytes()
        self._header.copy_(self.length)

    def _refusal(self, length: int) -> str:
        return (
            f"an encoder says that it packed {length} bytes into a message of at most {self.max_bytes}: "
            "--refit-encoding identity sends without it"
        )


class UnpackBatch(_FramedBatch):
    """Unpacks one message of `peer` from `buffer`, and keeps it where it is to be passed on."""

    kept: KeptMessage | None = None

    def __init__(self, decoder: Decoder, max_bytes: int, buffer: torch.Tensor, peer: int) -> None:
        super().__init__(max_bytes, buffer)
        self._decoder = decoder
        self._peer = peer

    def run_pieces(self) -> None:
        """Raises RefitError, naming the peer, where the header or what follows it is no message."""
        super().run_pieces()
        self.length.copy_(self._header)
        if not self.length.is_cuda:
            self.checked_bytes()
        if self.kept is not None:
            self.kept.put(self._payload, self.length)
        try:
            self._decoder.unpack(self._payload, self.length)
        except RefitError as error:
            raise RefitError(f"a message from rank {self._peer} cannot be decoded: {error}") from error

    def told_bytes(self, buffer: torch.Tensor) -> int:
        """What the header of the message in `buffer`, in CPU memory, says: its bytes, with the header.

        Raises RefitError, naming the peer, where they are more than were agreed.
        """
        return self._checked(int(buffer[:8].view(torch.int64)))

    def _refusal(self, length: int) -> str:
        return (
            f"the header of a message from rank {self._peer} says {length} bytes, the most are {self.max_bytes}: "
            "--refit-encoding identity sends without headers"
        )


def run_report(
    schedule: Schedule, clock: PhaseClock, sends: Iterable[CopyBatch | None], receives: Iterable[CopyBatch | None]
) -> RunReport:
    """The report of a run that `clock` has timed, with the bytes that its messages had and could have had."""
    report = schedule.report(clock)
    packed = [batch for batch in sends if isinstance(batch, PackBatch)]
    unpacked = [batch for batch in receives if isinstance(batch, UnpackBatch)]
    if not packed and not unpacked:
        return report
    return replace(
        report,
        wire_bytes_sent=sum(batch.moved_bytes for batch in packed),
        wire_bytes_received=sum(batch.moved_bytes for batch in unpacked),
        most_wire_bytes_sent=sum(HEADER_BYTES + batch.max_bytes for batch in packed),
    )
