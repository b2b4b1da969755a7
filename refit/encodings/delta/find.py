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


def take_changes(old: Array, new: Array) -> tuple[Positions, Array]:
    """Where `new` differs from `old`, of equal dtype and length: the positions, in order, and the values there.

    `old` is equal to `new` then. A CPU compares at the speed of memory; what comes behind it is kept small. So words of
    8 bytes are compared, and only of those that differ is looked at each element. An example with elements of 2 bytes,
    of which number 1 and number 30 have changed:

        words that differ    0 and 7: element 1 of word 0, element 2 of word 7
        positions            0 * 4 + 1 = 1 and 7 * 4 + 2 = 30

    Where many words differ, all elements are looked at: numpy finds those without branches.
    """
    per_word = 8 // old.itemsize
    num = len(old) // (8 * per_word) * 8
    end = num * per_word
    old_words, new_words = old[:end].view(np.uint64), new[:end].view(np.uint64)
    differs = old_words != new_words
    if 4 * np.count_nonzero(differs) > num:
        positions = np.flatnonzero(old != new)
        values = np.take(new, positions, mode="clip")  # with "raise" numpy takes into a buffer of its own first
        np.copyto(old, new)
        return positions, values
    words = _true(differs)
    ours, theirs = np.take(new_words, words, mode="clip"), np.take(old_words, words, mode="clip")
    old_words[words] = ours
    elements = ours.view(new.dtype)
    which = np.flatnonzero(elements != theirs.view(old.dtype))
    values, positions = np.take(elements, which, mode="clip"), _within(words, which, per_word)
    if end == len(old):
        return positions, values
    rest = np.flatnonzero(old[end:] != new[end:]) + end
    old[end:] = new[end:]
    return np.concatenate([positions, rest]), np.concatenate([values, new[rest]])


def _true(flags: NDArray[np.bool_]) -> Positions:
    """The positions of those that are set, in order: few of them, of a multiple of 8.

    `flatnonzero` mispredicts a branch for each. Among eights of which many have one it needs none.
    """
    eights = flags.view(np.uint64)
    numbers = np.flatnonzero(eights != 0)
    found = np.take(eights, numbers, mode="clip").view(np.bool_)
    return _within(numbers, np.flatnonzero(found), 8)


def _within(groups: Positions, which: Positions, size: int) -> Positions:
    """The positions of elements `which` of `groups` of `size`, a power of two, laid one behind another.

    Overwrites `which`.
    """
    positions = np.take(groups, which >> (size.bit_length() - 1), mode="clip")
    positions *= size
    which &= size - 1
    positions += which
    return positions


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
