"""Finds and packs the changed elements of a block on a CPU, and applies them. The twin of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refit.encodings.delta.elements import Array
from refit.encodings.delta.form import Form, data_bytes, places_bytes
from refit.errors import RefitError

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


def changed(old: Array, new: Array) -> Positions:
    """The positions, in order, at which `new` differs from `old`, of equal dtype and length.

    numpy compares in vectors and skips what is equal quickly: comparing words of eight bytes first takes three times as
    long at 1 % of changes.
    """
    return np.flatnonzero(old != new)


def pack_block(form: Form, positions: Positions, new: Array, data: Bytes) -> int:
    """Write the data of a block. Returns its bytes."""
    count, num, size = len(positions), len(new), new.itemsize
    end = data_bytes(form, count, num, size)
    begin = places_bytes(form, count, num)
    values = data[begin:end].view(new.dtype)
    if form is Form.WHOLE:
        values[:] = new
        return end
    if form is Form.POSITIONS:
        data[: 2 * count].view(np.uint16)[:] = positions
    else:
        is_changed = np.zeros(begin * 8, np.uint8)
        is_changed[positions] = 1
        data[:begin] = np.packbits(is_changed, bitorder="little")
    np.take(new, positions, out=values, mode="clip")  # with "raise" numpy takes into a buffer of its own first
    return end


def unpack_block(form: Form, count: int, num: int, data: Bytes, dtype: np.dtype[Any]) -> tuple[Positions, Array]:
    """The positions and the values of a block that is not whole. Raises RefitError where they are none."""
    begin = places_bytes(form, count, num)
    values = data[begin : data_bytes(form, count, num, dtype.itemsize)].view(dtype)
    if form is Form.POSITIONS:
        positions = data[: 2 * count].view(np.uint16).astype(np.int64)
    else:
        positions = np.flatnonzero(np.unpackbits(data[:begin], bitorder="little"))
        if len(positions) != count:
            raise RefitError(f"a block's mask has {len(positions)} changes, its entry says {count}")
    if count and int(positions.max()) >= num:
        raise RefitError(f"a block of {num} elements has a change at {int(positions.max())}")
    return positions, values
