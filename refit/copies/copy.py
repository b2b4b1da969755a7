"""Copy: one strided copy between two tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Copy:
    """`destination.copy_(source)`: equal shapes, any strides, a cast where the dtypes differ."""

    destination: torch.Tensor
    source: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.destination.numel() * self.destination.element_size()

    @property
    def is_in_place(self) -> bool:
        """Whether both are the same memory."""
        one, other = self.destination, self.source
        return (one.data_ptr(), one.dtype, one.stride()) == (other.data_ptr(), other.dtype, other.stride())
