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
Places = NDArray[np.uint16]
"""Positions in a block."""


def changed(old: Array, new: Array) -> Positions:
    """The positions, in order, at which `new` differs from `old`, of equal dtype and length.

    numpy compares at the speed of memory. `flatnonzero` takes twice as long again where few elements differ, here and
    there: each of them is a branch mispredicted. Then they are looked for in words of a bit for each of 16 elements.
    """
    differs = old != new
    words = np.zeros(-(-len(differs) // 16), np.uint16)
    words.view(np.uint8)[: -(-len(differs) // 8)] = np.packbits(differs, bitorder="little")
    numbers = np.flatnonzero(words != 0)
    if 2 * len(numbers) > len(words):
        return np.flatnonzero(differs)  # many differ: numpy finds these without branches
    found = _set_bits(np.take(words, numbers), numbers)
    return np.flatnonzero(differs) if found is None else found


def _set_bits(words: NDArray[np.uint16], numbers: Positions) -> Positions | None:
    """The positions, in order, of the bits that are set in `words`, the words of these `numbers`; the lowest bit first.

    None where most words have several bits: they are runs, which `flatnonzero` predicts well. An example: words 1 and 3
    are 0b1 and 0b1001, their bits are at 16, 48 and 51. The first round finds the lowest of each word, 16 and 48, and
    clears it; the next one what is left, 51.
    """
    first, found = numbers << 4, []
    while len(first):
        found.append(first + np.take(_LOWEST_BIT, words))
        words &= words - np.uint16(1)
        left = np.flatnonzero(words)
        if 2 * len(left) > len(numbers):
            return None
        words, first = np.take(words, left), np.take(first, left)
    positions = np.concatenate(found) if found else first
    positions.sort(kind="stable")  # merges the rounds, each of which is sorted
    return positions


_WORDS = np.arange(1, 1 << 16)
_LOWEST_BIT = np.concatenate([[0], np.log2(_WORDS & -_WORDS)]).astype(np.uint8)
"""The number of the lowest bit of each word of 16 bits."""


def update(old: Array, new: Array, positions: Positions) -> Array:
    """Make `old` equal to `new`, which differs at `positions`. Returns the values there."""
    values = np.take(new, positions, mode="clip")  # with "raise" numpy takes into a buffer of its own first
    if 2 * len(positions) > len(new):
        np.copyto(old, new)
    else:
        old[positions] = values
    return values


def pack_block(form: Form, positions: Places, values: Array, new: Array, data: Bytes) -> int:
    """Write the data of a block, whose changes have these `positions` in it and `values`. Returns its bytes."""
    count, num, size = len(positions), len(new), new.itemsize
    if form is Form.WHOLE:
        data[: num * size].view(new.dtype)[:] = new
        return num * size
    begin = places_bytes(form, count, num)
    end = begin + count * size
    if form is Form.POSITIONS:
        data[: 2 * count].view(np.uint16)[:] = positions
    else:
        is_changed = np.zeros(begin * 8, np.uint8)
        is_changed[positions] = 1
        data[:begin] = np.packbits(is_changed, bitorder="little")
    data[begin:end].view(new.dtype)[:] = values
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
