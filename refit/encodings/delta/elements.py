"""Elements: a piece of a message in a CPU's memory, as unsigned integers in row-major order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from refit.encodings.delta.form import element_bytes
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights
from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

Array = NDArray[np.unsignedinteger]

UNSIGNED: Mapping[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Elements:
    """`box` of a tensor in `weights`, whatever their strides and, at a source, their dtype."""

    def __init__(self, weights: LocalWeights, tensor: TensorSpec, box: Box) -> None:
        self._box = box
        self._dtype: torch.dtype = getattr(torch, tensor.dtype)
        self._views = weights.views(tensor.key, box)
        self.size = element_bytes(tensor)
        only = self._views[0].data if len(self._views) == 1 and self._views[0].data.dtype is self._dtype else None
        self._memory = _flat(only, self.size) if only is not None and only.is_contiguous() else None
        is_matrix = self._memory is None and only is not None and tensor.itemsize == self.size
        self._strided = _bits(only).numpy() if only is not None and is_matrix else None

    def read(self) -> Array:
        """All elements in order: the memory itself where it is contiguous and needs no cast, else a copy."""
        return self._memory if self._memory is not None else _flat(self._copied(), self.size)

    def read_into(self, elements: Array) -> None:
        """Copy all elements, in order."""
        if self._strided is not None:
            np.copyto(elements.reshape(self._box.extents), self._strided.view(elements.dtype))
        else:
            np.copyto(elements, self.read())

    def scatter(self, positions: NDArray[np.int64], values: Array) -> bool:
        """Write these elements, where single ones can be written: else return False."""
        if self._memory is not None:
            self._memory[positions] = values
        elif self._strided is not None:
            self._strided.view(values.dtype)[np.unravel_index(positions, self._box.extents)] = values
        else:
            return False
        return True

    def write(self, elements: Array) -> None:
        """Write all elements, in order."""
        if self._memory is not None:
            if self._memory is not elements:
                np.copyto(self._memory, elements)
        elif self._strided is not None:
            np.copyto(self._strided.view(elements.dtype), elements.reshape(self._box.extents))
        else:
            whole = torch.from_numpy(elements.view(np.uint8)).view(self._dtype).view(self._box.extents)
            for view in self._views:
                view.data.copy_(part_within(whole, self._box, view.box))

    def _copied(self) -> torch.Tensor:
        whole = torch.empty(self._box.extents, dtype=self._dtype)
        for view in self._views:
            part_within(whole, self._box, view.box).copy_(view.data)
        return whole


def _bits(data: torch.Tensor) -> torch.Tensor:
    return data.view(_BITS[data.element_size()])


def _flat(data: torch.Tensor, size: int) -> Array:
    found: Array = _bits(data.reshape(-1)).numpy().view(UNSIGNED[size])
    return found
