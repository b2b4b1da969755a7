"""The form of a message of changes, and how long it can be. Imports no torch.

A message is a preamble, a table, and data. Its pieces are taken as unsigned integers ("elements") in row-major order,
and divided into blocks of `block` elements, the last one of each piece shorter. All numbers are little-endian.

    byte  0   version, int64: that of the weights which the message leads to
          8   base, int64: the version that it builds on, -1 for none: then all blocks are whole
         16   block, int64: elements of a block
         24   0
         32   table: for each block of all pieces its start, int32, in units of 16 bytes, and its count, int32
          .   data, blocks in any order, each from a multiple of 16 bytes on

What a block's data is follows from its count k of changed elements, its n elements and their size, as the shortest of:

    positions   k x 2 bytes of positions in the block, in any order; then, from a multiple of 4 bytes on, k values
    mask        a bit for each element, in words of 4 bytes, the lowest bit first; then k values in order
    whole       n values

Values are those after the change, so a message that is applied twice changes nothing. An example: 4 of 8,192 elements
of 2 bytes take 8 + 8 bytes as positions, 1,024 + 8 with a mask, 16,384 whole.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

from refit.plan.box import Box
from refit.plan.sharding import TensorSpec

PREAMBLE_BYTES = 32
ENTRY_BYTES = 8
ALIGNMENT = 16
NO_BASE = -1

CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 13
"""Elements of a block. Positions have 16 bits. A CPU handles a block with a dozen calls of numpy, a GPU in one program:
large blocks cost the first, small ones the second nothing."""

LEAST_BLOCK = min(CPU_BLOCK, GPU_BLOCK)


class Form(IntEnum):
    """What the data of a block is."""

    POSITIONS = 0
    MASK = 1
    WHOLE = 2


def element_bytes(tensor: TensorSpec) -> int:
    """Bytes of an element: 1, 2 or 4. One of 8 bytes is taken as two."""
    return min(tensor.itemsize, 4)


def num_elements(tensor: TensorSpec, box: Box) -> int:
    return box.volume * tensor.itemsize // element_bytes(tensor)


def num_blocks(num: int, block: int) -> int:
    return -(-num // block)


def table_end(blocks: int) -> int:
    """The byte at which the data begins."""
    return aligned(PREAMBLE_BYTES + ENTRY_BYTES * blocks)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def places_bytes(form: Form, count: int, num: int) -> int:
    """Bytes that say where the changed elements of a block are, with the gap before the values."""
    if form is Form.POSITIONS:
        return -(-count // 2) * 4
    return -(-num // 32) * 4 if form is Form.MASK else 0


def data_bytes(form: Form, count: int, num: int, size: int) -> int:
    """Bytes of a block's data, without the gap behind it. `size` is that of an element."""
    return places_bytes(form, count, num) + (num if form is Form.WHOLE else count) * size


@lru_cache(maxsize=1 << 12)  # blocks have about as many changes, and each is asked about
def form_of(count: int, num: int, size: int) -> Form:
    """The shortest form of `count` changes among `num` elements of `size` bytes."""
    positions, mask = places_bytes(Form.POSITIONS, count, num), places_bytes(Form.MASK, count, num)
    if (num - count) * size <= min(positions, mask):
        return Form.WHOLE
    return Form.POSITIONS if positions <= mask else Form.MASK


def max_bytes(tensor: TensorSpec, box: Box) -> int:
    """The most bytes of a message that has this box alone: more than it adds to a message with others."""
    num = num_elements(tensor, box)
    blocks = num_blocks(num, LEAST_BLOCK)
    return PREAMBLE_BYTES + ALIGNMENT + (ENTRY_BYTES + ALIGNMENT) * blocks + num * element_bytes(tensor)


def expected_bytes(num: int, size: int, share: float, block: int = CPU_BLOCK) -> int:
    """About what `num` elements take where `share` of them have changed, evenly. Where they lie together, it is less:
    the bytes of a block grow ever slower with its changes."""
    count = round(min(num, block) * share)
    whole = data_bytes(form_of(count, min(num, block), size), count, min(num, block), size) if num else 0
    return round(num / max(1, min(num, block)) * (whole + ENTRY_BYTES))
