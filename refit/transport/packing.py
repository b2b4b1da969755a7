"""The copies that pack a message from weights into a buffer, and those that unpack it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refit.copies.copy import Copy
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights
from refit.transport.messages import Message


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
