"""The kernel that applies what a message says. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from refit.encodings.delta.kernels.bits import lowest_bit, num_bits, number_of, place_of, places_bytes


@triton.jit  # type: ignore[untyped-decorator]
def _apply_masks(
    held: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    masks: tl.tensor,
    data: tl.tensor,
    count: tl.tensor,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """Each lane takes a mask and writes the values of its bits, one at a time."""
    lane = tl.arange(0, LANES)
    done = 0
    word = 0
    while word * 32 < num:
        mask_at = word + lane
        bits = tl.load(masks + mask_at, mask=mask_at * 32 < num, other=0).to(tl.uint32, bitcast=True)
        lane_counts = num_bits(bits)
        value_at = done + tl.cumsum(lane_counts, 0) - lane_counts
        most = tl.max(lane_counts, 0)
        turn = 0
        while turn < most:
            bit = lowest_bit(bits)
            bits = bits ^ bit
            element = mask_at * 32 + number_of(bit)
            present = (bit != 0) & (element < num) & (value_at < count)
            values = tl.load(data + value_at, mask=present)
            tl.store(held + place_of(first, element, width, stride, STRIDED), values, mask=present)
            value_at += 1
            turn += 1
        done += tl.sum(lane_counts, 0)
        word += LANES


@triton.jit  # type: ignore[untyped-decorator]
def _apply_listed(
    held: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    positions: tl.tensor,
    data: tl.tensor,
    num_values: tl.tensor,
    is_whole: tl.tensor,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """Write each value to its position; with `is_whole`, one behind another."""
    done = 0
    while done < num_values:
        at = done + tl.arange(0, LANES)
        present = at < num_values
        if is_whole:
            element = at
        else:
            element = tl.load(positions + at, mask=present, other=0).to(tl.int32) & 0xFFFF
            present = present & (element < num)
        values = tl.load(data + at, mask=present)
        tl.store(held + place_of(first, element, width, stride, STRIDED), values, mask=present)
        done += LANES


@triton.jit(do_not_specialize=["version", "base", "max_bytes"])  # type: ignore[untyped-decorator]
def apply_changes(
    table: tl.tensor,
    payload: tl.tensor,
    max_bytes: tl.tensor,
    version: tl.tensor,
    base: tl.tensor,
    flag: tl.tensor,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """Write what a message says about one block.

    `table` `[blocks, 8]` is that of `find_and_pack`, with the address of the weights in its first column. Where the
    message leads to another version than `version`, builds on another than `base` or on none, or a block goes beyond
    `max_bytes` of `payload`, nothing of it is written and `flag`, int32, is set.
    """
    entry = table + tl.program_id(0).to(tl.int64) * 8
    held = tl.load(entry).to(tl.pointer_type(ITEM))
    first = tl.load(entry + 2).to(tl.int32)
    num = tl.load(entry + 3).to(tl.int32)
    width = tl.load(entry + 4).to(tl.int32)
    stride = tl.load(entry + 5)
    number = tl.load(entry + 6)
    preamble = payload.to(tl.pointer_type(tl.int64))
    told_base = tl.load(preamble + 1)
    place = payload.to(tl.pointer_type(tl.int32)) + 8 + number * 2
    begin = tl.load(place).to(tl.int64) * 16
    count = tl.load(place + 1)
    places = places_bytes(count, num, SIZE)
    nbytes = tl.where(places < 0, num * SIZE, places + count * SIZE)
    is_right = (tl.load(preamble) == version) & ((told_base == base) | (told_base == -1))
    is_right = is_right & (tl.load(preamble + 2) == BLOCK)
    is_right = is_right & (count >= 0) & (count <= num) & (begin >= 0) & (begin + nbytes <= max_bytes)
    if not is_right:
        tl.store(flag, 1)
    elif count > 0:
        data = (payload + begin + tl.maximum(places, 0)).to(tl.pointer_type(ITEM))
        if (places >= 0) & (places == (num + 31) // 32 * 4) & (places < (count + 1) // 2 * 4):
            masks = (payload + begin).to(tl.pointer_type(tl.int32))
            _apply_masks(held, first, num, width, stride, masks, data, count, LANES, STRIDED)
        else:
            is_whole = places < 0  # with all elements, whether they have changed or not
            num_values = tl.where(is_whole, num, count)
            positions = (payload + begin).to(tl.pointer_type(tl.int16))
            _apply_listed(held, first, num, width, stride, positions, data, num_values, is_whole, LANES, STRIDED)
