"""The hooks of weights that pack their messages themselves: an encoder at the source, a decoder at the destination."""

from __future__ import annotations

from typing import Protocol

import torch

from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

Piece = tuple[TensorSpec, Box]
"""A box of a tensor, in the dtype of the tensor, as part of a message."""


class Encoder(Protocol):
    """Packs the pieces of one message. Bound to the weights once, run in every refit."""

    def pack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Write the message into the beginning of `payload`, and its bytes into `length`, int64 `[1]`.

        `payload` is uint8 of as many bytes as the wire's `max_bytes` allows for the pieces, perhaps in the memory of a
        peer: write it once, and do not read it. On a GPU: enqueue on the current stream, without waiting.
        """
        ...


class Decoder(Protocol):
    """Unpacks the pieces of one message into the weights. Bound to the weights once, run in every refit."""

    def unpack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Use the first `length`, int64 `[1]`, bytes of `payload`, uint8, which are a message.

        On CPUs, `length` is at most the bytes of `payload`, and RefitError is raised where these are no such message.
        On a GPU: enqueue on the current stream. Nobody has looked at `length` there: never go beyond `payload`.
        """
        ...
