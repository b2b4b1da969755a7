"""The kernels of deltas: one finds and packs what has changed, one applies it. Importing this module needs Triton.

A program has one block. A lane compares 32 elements at a time, in words of eight bytes that lie `LANES` words apart, so
that all loads are coalesced, and keeps a bit for each. Only lanes know which elements have changed then; one prefix sum
over the lanes' counts says where each writes, and one atomic addition where the block does, so most of the work is
comparing. Lanes take their bits one by one: at a share of 1 %, few have more than one.

    word      j = 0                    j = 1                 . . .
    lane      0     1     2  .  .  .   0     1     2  .  .
    elements  0..3  4..7  8..11        4 LANES ..            of 2 bytes

Of a word's two halves, `_changed_fields` leaves the highest bit of each element that differs, in one half where it is,
in the other shifted by one. Words then differ by shifts of two: of elements of 2 bytes, bit 15 - 2 j - half of a field
of 16 stands for word j. So 8 words of 4 elements fill 32 bits.

A snapshot is written where a word has changed, and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _changed_fields(half: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The highest bit of each field of `half`, uint32, that is not zero: of 4, 2 or 1 fields of SIZE bytes."""
    low: tl.constexpr = 0x7F7F7F7F if SIZE == 1 else 0x7FFF7FFF if SIZE == 2 else 0x7FFFFFFF
    high: tl.constexpr = 0xFFFFFFFF - low
    return ((half & low) + low | half) & high


@triton.jit  # type: ignore[untyped-decorator]
def _num_bits(bits: tl.tensor) -> tl.tensor:
    """How many bits of each uint32 are set, int32 (Warren, Hacker's Delight, 5-1)."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _lowest_bit(bits: tl.tensor) -> tl.tensor:
    """The lowest bit that is set of each uint32, alone; 0 of 0."""
    return bits & (0 - bits.to(tl.int32, bitcast=True)).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _number_of(bit: tl.tensor) -> tl.tensor:
    """The number of the one bit that is set of each uint32, int32: the exponent of it as a float32."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit  # type: ignore[untyped-decorator]
def _element_of(number: tl.tensor, lane: tl.tensor, SIZE: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """The element in its tile that bit `number` of `lane` stands for."""
    field_bits: tl.constexpr = 8 * SIZE
    field = number // field_bits
    turn = field_bits - 1 - number % field_bits
    return ((turn >> 1) * LANES + lane) * (8 // SIZE) + (turn & 1) * (4 // SIZE) + field


@triton.jit  # type: ignore[untyped-decorator]
def _places_bytes(count: tl.tensor, num: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """`form.places_bytes` of the shortest form; -1 for a whole block."""
    positions = (count + 1) // 2 * 4
    mask = (num + 31) // 32 * 4
    least = tl.minimum(positions, mask)
    return tl.where(least + count * SIZE < num * SIZE, least, -1)


@triton.jit  # type: ignore[untyped-decorator]
def _at(element: tl.tensor, width: tl.tensor, stride: tl.tensor, STRIDED: tl.constexpr) -> tl.tensor:
    """Where an element of a piece is, in elements from its first: in rows of `width` that are `stride` apart."""
    if STRIDED:
        row = element // width
        return row.to(tl.int64) * stride + (element - row * width)
    return element


@triton.jit(do_not_specialize=["version", "base", "table_bytes"])  # type: ignore[untyped-decorator]
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
    TILES: tl.constexpr,
    WIDE: tl.constexpr,
    STRIDED: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """Compare a block of new elements with the snapshot, pack what differs, and write that into the snapshot.

    `table` `[blocks, 8]`, int64, has for each block: the address of the piece's new elements, that of the block in the
    snapshot, the block's first element in the piece, its elements, the width and the stride of the piece's rows, the
    block's number in the message, and where it lies in a full one, in 16 bytes. ITEM is the integer of SIZE bytes.
    WIDE: the new elements, the snapshot, rows and the block have multiples of 16 bytes, at addresses that are, too.
    STRIDED: rows are not one behind another. FULL: all blocks are sent whole.

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
    per_word: tl.constexpr = 8 // SIZE
    words: tl.constexpr = 4 * SIZE
    tile_elements: tl.constexpr = 32 * LANES
    lane = tl.arange(0, LANES)
    if number == 0:
        preamble = payload.to(tl.pointer_type(tl.int64))
        tl.store(preamble, version)
        tl.store(preamble + 1, base)
        tl.store(preamble + 2, tl.full((), tile_elements * TILES, tl.int64))
        tl.store(preamble + 3, tl.full((), 0, tl.int64))
    place = payload.to(tl.pointer_type(tl.int32)) + 8 + number * 2
    if FULL:
        start = tl.load(entry + 7)
        data = (payload + start * 16).to(tl.pointer_type(ITEM))
        done = 0
        while done < num:
            element = done + tl.arange(0, tile_elements)
            present = element < num
            values = tl.load(new + _at(first + element, width, stride, STRIDED), mask=present)
            tl.store(old + element, values, mask=present)
            tl.store(data + element, values, mask=present)
            done += tile_elements
        tl.store(place, start.to(tl.int32))
        tl.store(place + 1, num)
        tl.store(counts + number, num)
    else:
        low = tl.zeros((LANES,), tl.uint32)
        high = tl.zeros((LANES,), tl.uint32)
        for tile in tl.static_range(TILES):
            bits = tl.zeros((LANES,), tl.uint32)
            for j in tl.static_range(words):
                word = (tile * words + j) * LANES + lane
                if WIDE:
                    word_at = _at(first // per_word + word, width // per_word, stride // per_word, STRIDED)
                    new_words = tl.multiple_of(new.to(tl.pointer_type(tl.int64)), 16)
                    old_words = tl.multiple_of(old.to(tl.pointer_type(tl.int64)), 16)
                    present = word < tl.multiple_of(num // per_word, 2)
                    after = tl.load(new_words + word_at, mask=present, other=0)
                    before = tl.load(old_words + word, mask=present, other=0, eviction_policy="evict_first")
                    tl.store(old_words + word, after, mask=before != after)
                    differs = before ^ after
                    lower = _changed_fields((differs & 0xFFFFFFFF).to(tl.uint32), SIZE)
                    upper = _changed_fields(((differs >> 32) & 0xFFFFFFFF).to(tl.uint32), SIZE)
                    bits |= (lower | (upper >> 1)) >> (2 * j)
                else:
                    for k in tl.static_range(per_word):
                        element = word * per_word + k
                        present = element < num
                        after = tl.load(new + _at(first + element, width, stride, STRIDED), mask=present, other=0)
                        before = tl.load(old + element, mask=present, other=0)
                        tl.store(old + element, after, mask=before != after)
                        bit = (k % (4 // SIZE)) * 8 * SIZE + 8 * SIZE - 1 - 2 * j - k // (4 // SIZE)
                        bits |= (before != after).to(tl.uint32) << bit
            if tile == 0:
                low = bits
            else:
                high = bits
        lane_counts = _num_bits(low) + _num_bits(high)
        ends = tl.cumsum(lane_counts, 0)
        count = tl.sum(lane_counts, 0)
        tl.store(counts + number, count)
        tl.store(place + 1, count)
        if count == 0:
            tl.store(place, 0)
        else:
            places = _places_bytes(count, num, SIZE)
            nbytes = tl.where(places < 0, num * SIZE, places + count * SIZE)
            begin = tl.atomic_add(length, ((nbytes + 15) // 16 * 16).to(tl.int64), sem="relaxed")
            tl.store(place, (begin // 16).to(tl.int32))
            if places < 0:
                data = (payload + begin).to(tl.pointer_type(ITEM))
                done = 0
                while done < num:
                    element = done + tl.arange(0, tile_elements)
                    present = element < num
                    values = tl.load(new + _at(first + element, width, stride, STRIDED), mask=present)
                    tl.store(data + element, values, mask=present)
                    done += tile_elements
            elif places == (count + 1) // 2 * 4:
                positions = (payload + begin).to(tl.pointer_type(tl.int16))
                data = (payload + begin + places).to(tl.pointer_type(ITEM))
                at = ends - lane_counts
                most = tl.max(lane_counts, 0)
                turn = 0
                while turn < most:
                    is_low = low != 0
                    bit = _lowest_bit(tl.where(is_low, low, high))
                    low = tl.where(is_low, low ^ bit, low)
                    high = tl.where(is_low, high, high ^ bit)
                    present = bit != 0
                    element = _element_of(_number_of(bit), lane, SIZE, LANES) + tl.where(is_low, 0, tile_elements)
                    values = tl.load(new + _at(first + element, width, stride, STRIDED), mask=present)
                    tl.store(positions + at, element.to(tl.int16), mask=present)
                    tl.store(data + at, values, mask=present)
                    at += 1
                    turn += 1
            else:
                masks = (payload + begin).to(tl.pointer_type(tl.int32))
                data = (payload + begin + places).to(tl.pointer_type(ITEM))
                lanes_per_mask: tl.constexpr = 32 // per_word
                mask_number = tl.arange(0, LANES // lanes_per_mask)
                shift = ((lane % lanes_per_mask) * per_word).to(tl.uint32)
                done = 0
                for tile in tl.static_range(TILES):
                    bits = low if tile == 0 else high
                    for j in tl.static_range(words):
                        word = (tile * words + j) * LANES + lane
                        here = tl.zeros((LANES,), tl.uint32)
                        for k in tl.static_range(per_word):
                            bit = (k % (4 // SIZE)) * 8 * SIZE + 8 * SIZE - 1 - 2 * j - k // (4 // SIZE)
                            here |= ((bits >> bit) & 1) << k
                        mask = tl.sum(tl.reshape(here << shift, (LANES // lanes_per_mask, lanes_per_mask)), 1)
                        mask_at = (tile * words + j) * (LANES // lanes_per_mask) + mask_number
                        tl.store(masks + mask_at, mask.to(tl.int32, bitcast=True), mask=mask_at < (num + 31) // 32)
                        here_counts = _num_bits(here)
                        at = done + tl.cumsum(here_counts, 0) - here_counts
                        for k in tl.static_range(per_word):
                            present = ((here >> k) & 1) != 0
                            element = word * per_word + k
                            values = tl.load(new + _at(first + element, width, stride, STRIDED), mask=present)
                            tl.store(data + at, values, mask=present)
                            at += present.to(tl.int32)
                        done += tl.sum(here_counts, 0)


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
    places = _places_bytes(count, num, SIZE)
    nbytes = tl.where(places < 0, num * SIZE, places + count * SIZE)
    is_right = (tl.load(preamble) == version) & ((told_base == base) | (told_base == -1))
    is_right = is_right & (tl.load(preamble + 2) == BLOCK)
    is_right = is_right & (count >= 0) & (count <= num) & (begin >= 0) & (begin + nbytes <= max_bytes)
    if not is_right:
        tl.store(flag, 1)
    elif count > 0:
        lane = tl.arange(0, LANES)
        data = (payload + begin + tl.maximum(places, 0)).to(tl.pointer_type(ITEM))
        if (places >= 0) & (places == (num + 31) // 32 * 4) & (places < (count + 1) // 2 * 4):
            masks = (payload + begin).to(tl.pointer_type(tl.int32))
            done = 0
            word = 0
            while word * 32 < num:
                mask_at = word + lane
                bits = tl.load(masks + mask_at, mask=mask_at * 32 < num, other=0).to(tl.uint32, bitcast=True)
                lane_counts = _num_bits(bits)
                at = done + tl.cumsum(lane_counts, 0) - lane_counts
                most = tl.max(lane_counts, 0)
                turn = 0
                while turn < most:
                    bit = _lowest_bit(bits)
                    bits = bits ^ bit
                    element = mask_at * 32 + _number_of(bit)
                    present = (bit != 0) & (element < num) & (at < count)
                    values = tl.load(data + at, mask=present)
                    tl.store(held + _at(first + element, width, stride, STRIDED), values, mask=present)
                    at += 1
                    turn += 1
                done += tl.sum(lane_counts, 0)
                word += LANES
        else:
            positions = (payload + begin).to(tl.pointer_type(tl.int16))
            done = 0
            while done < count:
                at = done + lane
                present = at < count
                if places < 0:
                    element = at
                else:
                    element = tl.load(positions + at, mask=present, other=0).to(tl.int32) & 0xFFFF
                    present = present & (element < num)
                values = tl.load(data + at, mask=present)
                tl.store(held + _at(first + element, width, stride, STRIDED), values, mask=present)
                done += LANES
