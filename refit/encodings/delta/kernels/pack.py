"""The kernel that finds and packs what has changed. Importing this module needs Triton.

A program takes a block. A lane compares 32 of its elements, in words of eight bytes that lie as many words apart as
there are lanes, so that all loads are coalesced, and keeps a bit for each. Only lanes know
which elements have changed then: one prefix sum over the lanes' counts says where each writes, and one atomic addition
where the block does, so most of the work is comparing. Lanes take their bits one by one: of 32 elements at a share of
1 %, few have more than one.

    turn      0                        1                 . . .
    lane      0     1     2  .  .  .   0     1     2  .  .
    elements  0..3  4..7  8..11        4 LANES ..            of 2 bytes

Of a word's two halves, `_changed_fields` leaves the highest bit of each element that differs, in the lower half where
it is, in the upper one shifted by one. The bits of turns then differ by shifts of two: of elements of 2 bytes, bit
15 - 2 turn - half of a field of 16. So 8 turns with 4 elements each fill 32 bits.

A snapshot is written where a word has changed, and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refit.encodings.delta.kernels.bits import lowest_bit, num_bits, number_of, place_of, places_bytes


@triton.jit  # type: ignore[untyped-decorator]
def _changed_fields(half: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The highest bit of each field of `half`, uint32, that is not zero: of 4, 2 or 1 fields of SIZE bytes."""
    low: tl.constexpr = 0x7F7F7F7F if SIZE == 1 else 0x7FFF7FFF if SIZE == 2 else 0x7FFFFFFF
    high: tl.constexpr = 0xFFFFFFFF - low
    return ((half & low) + low | half) & high


@triton.jit  # type: ignore[untyped-decorator]
def _bit_of(k: tl.constexpr, turn: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The bit that stands for element `k` of the word of a `turn`."""
    return (k % (4 // SIZE)) * 8 * SIZE + 8 * SIZE - 1 - k // (4 // SIZE) - 2 * turn


@triton.jit  # type: ignore[untyped-decorator]
def _element_of(number: tl.tensor, lane: tl.tensor, SIZE: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """The element in its block that bit `number` of `lane` stands for."""
    field_bits: tl.constexpr = 8 * SIZE
    field = number // field_bits
    turn = field_bits - 1 - number % field_bits
    return ((turn >> 1) * LANES + lane) * (8 // SIZE) + (turn & 1) * (4 // SIZE) + field


@triton.jit  # type: ignore[untyped-decorator]
def _copy_block(
    new: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    data: tl.tensor,
    old: tl.tensor,
    BLOCK: tl.constexpr,
    STRIDED: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    """All elements of a block into `data`, and with KEEP into the snapshot `old`."""
    done = 0
    while done < num:
        element = done + tl.arange(0, BLOCK)
        present = element < num
        values = tl.load(new + place_of(first, element, width, stride, STRIDED), mask=present)
        tl.store(data + element, values, mask=present)
        if KEEP:
            tl.store(old + element, values, mask=present)
        done += BLOCK


@triton.jit  # type: ignore[untyped-decorator]
def _changed_bits(
    new: tl.tensor,
    old: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    STRIDED: tl.constexpr,
) -> tl.tensor:
    """The bits of a block's changed elements, uint32 `[LANES]`. The snapshot `old` then has the new elements.

    All is loaded before anything is stored: a load may not overtake a store that might be to its address. The snapshot
    is not loaded to be evicted first: a word stored into a sector that the L2 cache has lost must be merged in memory.
    """
    per_word: tl.constexpr = 8 // SIZE
    turn = tl.arange(0, 4 * SIZE)[:, None]
    word = turn * LANES + tl.arange(0, LANES)[None, :]
    if WIDE:
        new_words = tl.multiple_of(new.to(tl.pointer_type(tl.int64)), 16)
        old_words = tl.multiple_of(old.to(tl.pointer_type(tl.int64)), 16)
        present = word < tl.multiple_of(num // per_word, 2)
        word_at = place_of(first // per_word, word, width // per_word, stride // per_word, STRIDED)
        after = tl.load(new_words + word_at, mask=present, other=0)
        before = tl.load(old_words + word, mask=present, other=0)
        differs = before ^ after
        lower = _changed_fields((differs & 0xFFFFFFFF).to(tl.uint32), SIZE)
        upper = _changed_fields(((differs >> 32) & 0xFFFFFFFF).to(tl.uint32), SIZE)
        bits = tl.sum((lower | (upper >> 1)) >> (2 * turn).to(tl.uint32), 0)
        tl.store(old_words + word, after, mask=differs != 0)
    else:
        bits = tl.zeros((LANES,), tl.uint32)
        for k in tl.static_range(per_word):
            element = word * per_word + k
            present = element < num
            after = tl.load(new + place_of(first, element, width, stride, STRIDED), mask=present, other=0)
            before = tl.load(old + element, mask=present, other=0)
            differs = before != after
            tl.store(old + element, after, mask=differs)
            bits |= tl.sum(differs.to(tl.uint32) << _bit_of(k, turn, SIZE).to(tl.uint32), 0)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def _pack_positions(
    new: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    bits: tl.tensor,
    positions: tl.tensor,
    data: tl.tensor,
    at: tl.tensor,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """Each lane takes its bits, one at a time, and writes from `at` on."""
    lane = tl.arange(0, LANES)
    most = tl.max(num_bits(bits), 0)
    turn = 0
    while turn < most:
        bit = lowest_bit(bits)
        bits = bits ^ bit
        present = bit != 0
        element = _element_of(number_of(bit), lane, SIZE, LANES)
        values = tl.load(new + place_of(first, element, width, stride, STRIDED), mask=present)
        tl.store(positions + at, element.to(tl.int16), mask=present)
        tl.store(data + at, values, mask=present)
        at += present.to(tl.int32)
        turn += 1


@triton.jit  # type: ignore[untyped-decorator]
def _pack_masks(
    new: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    bits: tl.tensor,
    masks: tl.tensor,
    data: tl.tensor,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> None:
    """The masks and the values of a block: each turn has a word of each lane, in order."""
    per_word: tl.constexpr = 8 // SIZE
    lanes_per_mask: tl.constexpr = 32 // per_word
    lane = tl.arange(0, LANES)
    shift = ((lane % lanes_per_mask) * per_word).to(tl.uint32)
    done = tl.sum(tl.zeros((LANES,), tl.int32), 0)
    turn = 0
    while turn < 4 * SIZE:
        word = turn * LANES + lane
        here = tl.zeros((LANES,), tl.uint32)
        for k in tl.static_range(per_word):
            here |= ((bits >> _bit_of(k, turn, SIZE).to(tl.uint32)) & 1) << k
        mask = tl.sum(tl.reshape(here << shift, (LANES // lanes_per_mask, lanes_per_mask)), 1)
        mask_at = turn * (LANES // lanes_per_mask) + tl.arange(0, LANES // lanes_per_mask)
        tl.store(masks + mask_at, mask.to(tl.int32, bitcast=True), mask=mask_at < (num + 31) // 32)
        counts = num_bits(here)
        at = done + tl.cumsum(counts, 0) - counts
        for k in tl.static_range(per_word):
            present = ((here >> k) & 1) != 0
            values = tl.load(new + place_of(first, word * per_word + k, width, stride, STRIDED), mask=present)
            tl.store(data + at, values, mask=present)
            at += present.to(tl.int32)
        done += tl.sum(counts, 0)
        turn += 1


@triton.jit  # type: ignore[untyped-decorator]
def _pack_changed(
    new: tl.tensor,
    old: tl.tensor,
    first: tl.tensor,
    num: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    bits: tl.tensor,
    payload: tl.tensor,
    length: tl.tensor,
    place: tl.tensor,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    STRIDED: tl.constexpr,
) -> tl.tensor:
    """The changed elements of a block in their shortest form, where `length` says that there is room.

    Writes the block's row of the message's table, at `place`, and returns how many have changed.
    """
    lane_counts = num_bits(bits)
    count = tl.sum(lane_counts, 0)
    tl.store(place + 1, count)
    if count == 0:
        tl.store(place, 0)
    else:
        places = places_bytes(count, num, SIZE)
        nbytes = tl.where(places < 0, num * SIZE, places + count * SIZE)
        begin = tl.atomic_add(length, ((nbytes + 15) // 16 * 16).to(tl.int64), sem="relaxed")
        tl.store(place, (begin // 16).to(tl.int32))
        data = (payload + begin + tl.maximum(places, 0)).to(tl.pointer_type(ITEM))
        if places < 0:
            _copy_block(new, first, num, width, stride, data, old, 8 * LANES, STRIDED, False)
        elif places == (count + 1) // 2 * 4:
            positions = (payload + begin).to(tl.pointer_type(tl.int16))
            at = tl.cumsum(lane_counts, 0) - lane_counts
            _pack_positions(new, first, width, stride, bits, positions, data, at, SIZE, LANES, STRIDED)
        else:
            masks = (payload + begin).to(tl.pointer_type(tl.int32))
            _pack_masks(new, first, num, width, stride, bits, masks, data, SIZE, LANES, STRIDED)
    return count


@triton.jit(do_not_specialize=["version", "base"])  # type: ignore[untyped-decorator]
def find_and_pack(
    table: tl.tensor,
    payload: tl.tensor,
    length: tl.tensor,
    counts: tl.tensor,
    version: tl.tensor,
    base: tl.tensor,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """Compare a block of new elements with its snapshot, pack what differs, and write that into the snapshot.

    `table` `[blocks, 8]`, int64, has for each block: the address of its new elements, that of the block in the
    snapshot, the block's first element in the piece, its elements, the width and the stride of the piece's rows, the
    block's number in the message, and where it lies in a full one, in 16 bytes. ITEM is the integer of SIZE bytes.
    WIDE: the new elements, the snapshot, rows and the block have multiples of 16 bytes, at addresses that are, too.
    STRIDED: rows are not one behind another, and the first column has the address of the piece. FULL: all blocks are
    sent whole.

    `length`, int64, is where the data begins, in bytes, and then where it ends. `counts` get each block's changes.
    """
    entry = table + tl.program_id(0).to(tl.int64) * 8
    new = tl.load(entry).to(tl.pointer_type(ITEM))
    old = tl.load(entry + 1).to(tl.pointer_type(ITEM))
    first = tl.load(entry + 2).to(tl.int32)
    num = tl.load(entry + 3).to(tl.int32)
    width = tl.load(entry + 4).to(tl.int32)
    stride = tl.load(entry + 5)
    number = tl.load(entry + 6)
    if number == 0:
        preamble = payload.to(tl.pointer_type(tl.int64))
        tl.store(preamble, version)
        tl.store(preamble + 1, base)
        tl.store(preamble + 2, tl.full((), 32 * LANES, tl.int64))
        tl.store(preamble + 3, tl.full((), 0, tl.int64))
    place = payload.to(tl.pointer_type(tl.int32)) + 8 + number * 2
    if FULL:
        start = tl.load(entry + 7)
        whole = (payload + start * 16).to(tl.pointer_type(ITEM))
        _copy_block(new, first, num, width, stride, whole, old, 8 * LANES, STRIDED, True)
        tl.store(place, start.to(tl.int32))
        tl.store(place + 1, num)
        tl.store(counts + number, num)
    else:
        bits = _changed_bits(new, old, first, num, width, stride, SIZE, LANES, WIDE, STRIDED)
        count = _pack_changed(
            new, old, first, num, width, stride, bits, payload, length, place, ITEM, SIZE, LANES, STRIDED
        )
        tl.store(counts + number, count)
