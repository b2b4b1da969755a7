"""What both kernels know of bits, of a block's shortest form, and of where its elements are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def num_bits(bits: tl.tensor) -> tl.tensor:
    """How many bits of each uint32 are set, int32 (Warren, Hacker's Delight, 5-1)."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def lowest_bit(bits: tl.tensor) -> tl.tensor:
    """The lowest bit that is set of each uint32, alone; 0 of 0."""
    return bits & (0 - bits.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def number_of(bit: tl.tensor) -> tl.tensor:
    """The number of the one bit that is set of each uint32, int32: the exponent of it as a float32."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit  # type: ignore[untyped-decorator]
def places_bytes(count: tl.tensor, num: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """`form.places_bytes` of the shortest form; -1 for a whole block."""
    positions = (count + 1) // 2 * 4
    mask = (num + 31) // 32 * 4
    least = tl.minimum(positions, mask)
    return tl.where(least + count * SIZE < num * SIZE, least, -1)


@triton.jit  # type: ignore[untyped-decorator]
def place_of(
    first: tl.tensor, element: tl.tensor, width: tl.tensor, stride: tl.tensor, STRIDED: tl.constexpr
) -> tl.tensor:
    """Where an element of a block that begins at `first` is: in rows of `width` that are `stride` apart.

    Without them the block's address is in the table, as one that is known to be a multiple of 16 stays one.
    """
    where = element
    if STRIDED:
        row = (first + element) // width
        where = row.to(tl.int64) * stride + (first + element - row * width)
    return where
