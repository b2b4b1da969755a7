"""Encoder and decoder of messages between CPUs' memories."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from refit.encodings.delta.counts import Counts
from refit.encodings.delta.elements import UNSIGNED, Array, Elements
from refit.encodings.delta.find import Bytes, pack_block, take_changes, unpack_block
from refit.encodings.delta.form import (
    ALIGNMENT,
    CPU_BLOCK,
    NO_BASE,
    PREAMBLE_BYTES,
    Form,
    aligned,
    data_bytes,
    element_bytes,
    form_of,
    num_blocks,
    num_elements,
    places_bytes,
    table_end,
)
from refit.encodings.delta.versions import Versions
from refit.errors import RefitError
from refit.memory.codec import Piece
from refit.memory.phases import count_apart
from refit.memory.weights import LocalWeights

FIND, PACK, APPLY = "find", "pack", "apply"

BLOCKS_AT_A_TIME = 8
"""Blocks that are compared at a time: enough that calls of numpy cost little, and few enough for a CPU's cache."""


class CpuEncoder:
    """Compares the pieces of one message with a snapshot of what was sent last, and packs what has changed."""

    def __init__(
        self,
        weights: LocalWeights,
        pieces: Sequence[Piece],
        versions: Versions,
        counts: Counts,
        block: int = CPU_BLOCK,
    ) -> None:
        """`block` elements make a block: a multiple of 16, and at most 2**16."""
        self._versions, self._counts, self._block = versions, counts, block
        self._pieces = [Elements(weights, tensor, box) for tensor, box in pieces]
        self._snapshot = [
            np.empty(num_elements(tensor, box), UNSIGNED[element_bytes(tensor)]) for tensor, box in pieces
        ]
        self._blocks = sum(num_blocks(len(each), block) for each in self._snapshot)

    @property
    def snapshot_bytes(self) -> int:
        return sum(each.nbytes for each in self._snapshot)

    def pack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        message = payload.numpy()
        message[:PREAMBLE_BYTES].view(np.int64)[:] = (self._versions.version, self._versions.base, self._block, 0)
        table = message[PREAMBLE_BYTES : table_end(self._blocks)].view(np.int32).reshape(-1, 2)
        pack = self._pack_all if self._versions.is_full else self._pack_changes
        length.fill_(pack(message, table))

    def _pack_all(self, message: Bytes, table: NDArray[np.int32]) -> int:
        began, number, end = time.perf_counter(), 0, table_end(self._blocks)
        for piece, snapshot in zip(self._pieces, self._snapshot, strict=True):
            piece.read_into(snapshot)
            count_whole = self._enter_whole(table[number:], len(snapshot), snapshot.itemsize, end)
            message[end : end + snapshot.nbytes] = snapshot.view(np.uint8)
            number, end = number + count_whole, aligned(end + snapshot.nbytes)
            self._counts.add(len(snapshot), 0, 0, snapshot.nbytes)
        count_apart(PACK, time.perf_counter() - began)
        return end

    def _pack_changes(self, message: Bytes, table: NDArray[np.int32]) -> int:
        end, number, found_s, began = table_end(self._blocks), 0, 0.0, time.perf_counter()
        step = BLOCKS_AT_A_TIME * self._block
        for piece, snapshot in zip(self._pieces, self._snapshot, strict=True):
            since = time.perf_counter()
            elements = piece.read()
            found_s += time.perf_counter() - since
            for begin in range(0, len(snapshot), step):
                since = time.perf_counter()
                old, new = snapshot[begin : begin + step], elements[begin : begin + step]
                positions, values = take_changes(old, new)
                found_s += time.perf_counter() - since
                count = num_blocks(len(new), self._block)
                end = self._pack_blocks(message, table[number : number + count], end, new, positions, values)
                number += count
        count_apart(FIND, found_s)
        count_apart(PACK, time.perf_counter() - began - found_s)
        return end

    def _pack_blocks(
        self,
        message: Bytes,
        table: NDArray[np.int32],
        end: int,
        new: Array,
        positions: NDArray[np.int64],
        values: Array,
    ) -> int:
        """Write the data of blocks whose elements are `new` from byte `end` on. Returns where it ends."""
        size, block, entries = new.itemsize, self._block, []
        begins = range(0, len(new), block)
        bounds = np.searchsorted(positions, [*begins, len(new)]).tolist()
        low = positions.astype(np.uint16)  # modulo 2**16, as the differences below
        halves = message[: len(message) // 2 * 2].view(np.uint16)
        typed = message[: len(message) // size * size].view(new.dtype)
        place_bytes = value_bytes = 0
        for number, begin in enumerate(begins):
            first, last = bounds[number], bounds[number + 1]
            count, num = last - first, min(block, len(new) - begin)
            form = form_of(count, num, size)
            places = low[first:last]
            if begin & 0xFFFF:
                places = places - np.uint16(begin & 0xFFFF)
            own = places_bytes(form, count, num)
            if form is Form.POSITIONS:  # what `pack_block` does, in fewer calls
                halves[end // 2 : end // 2 + count] = places
                begin_of_values = (end + own) // size
                typed[begin_of_values : begin_of_values + count] = values[first:last]
                nbytes = own + count * size
            else:
                nbytes = pack_block(form, places, values[first:last], new[begin : begin + num], message[end:])
            entries.append((end // ALIGNMENT, count))
            place_bytes += own
            value_bytes += nbytes - own
            end = aligned(end + nbytes)
        table[:] = entries
        self._counts.add(len(new), len(positions), place_bytes, value_bytes)
        return end

    def _enter_whole(self, table: NDArray[np.int32], num: int, size: int, start: int) -> int:
        """Write the entries of a piece of which all blocks are whole, one behind another. Returns how many they are."""
        begins = np.arange(0, num, self._block)
        table[: len(begins), 0] = (start + begins * size) // ALIGNMENT
        table[: len(begins), 1] = np.minimum(self._block, num - begins)
        return len(begins)


class CpuDecoder:
    """Applies what one message says to the weights."""

    def __init__(self, weights: LocalWeights, pieces: Sequence[Piece], versions: Versions) -> None:
        self._versions = versions
        self._sizes = [num_elements(tensor, box) for tensor, box in pieces]
        self._pieces = [Elements(weights, tensor, box) for tensor, box in pieces]

    def unpack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        """Raises RefitError where the message builds on another version, or is none."""
        began = time.perf_counter()
        message = payload.numpy()[: int(length)]
        if len(message) < PREAMBLE_BYTES:
            raise RefitError(f"it has {len(message)} bytes, a preamble {PREAMBLE_BYTES}")
        version, base, block, _ = message[:PREAMBLE_BYTES].view(np.int64).tolist()
        self._versions.check(version, base)
        if not 0 < block <= 1 << 16:
            raise RefitError(f"its blocks have {block} elements")
        blocks = sum(num_blocks(num, block) for num in self._sizes)
        if table_end(blocks) > len(message):
            raise RefitError(
                f"it has {len(message)} bytes, the table of its {blocks} blocks ends at {table_end(blocks)}"
            )
        table = message[PREAMBLE_BYTES : table_end(blocks)].view(np.int32).reshape(-1, 2)
        number = 0
        for piece, num in zip(self._pieces, self._sizes, strict=True):
            entries = table[number : number + num_blocks(num, block)]
            number += len(entries)
            if base == NO_BASE:
                self._replace(piece, num, entries, message, block)
            else:
                _change(piece, num, entries, message, block)
        count_apart(APPLY, time.perf_counter() - began)

    def _replace(self, piece: Elements, num: int, entries: NDArray[np.int32], message: Bytes, block: int) -> None:
        """All blocks are whole, one behind another."""
        start = int(entries[0, 0]) * ALIGNMENT if len(entries) else 0
        data = message[start : start + num * piece.size]
        if int(entries[:, 1].sum()) != num or len(data) != num * piece.size:
            raise RefitError(f"a full message has {int(entries[:, 1].sum())} of the {num} elements of a piece")
        piece.write(data.view(UNSIGNED[piece.size]))


def _change(piece: Elements, num: int, entries: NDArray[np.int32], message: Bytes, block: int) -> None:
    dtype = UNSIGNED[piece.size]
    whole: Array | None = None
    for (begin, form, count, data), length in list(_blocks(piece, num, entries, message, block)):
        if not count:
            continue
        if form is not Form.WHOLE:
            positions, values = unpack_block(form, count, length, data, dtype)
            if whole is None and piece.scatter(begin + positions, values):
                continue
            whole = piece.read() if whole is None else whole
            whole[begin + positions] = values
        else:
            whole = piece.read() if whole is None else whole
            whole[begin : begin + length] = data.view(dtype)
    if whole is not None:
        piece.write(whole)


def _blocks(
    piece: Elements, num: int, entries: NDArray[np.int32], message: Bytes, block: int
) -> Iterator[tuple[tuple[int, Form, int, Bytes], int]]:
    """Of each block where it begins, its form, its count and its data, and how many elements it has."""
    for number, (start, count) in enumerate(entries.tolist()):
        begin = number * block
        length = min(block, num - begin)
        if not 0 <= count <= length:
            raise RefitError(f"a block of {length} elements has {count} changes")
        form = form_of(count, length, piece.size)
        first = start * ALIGNMENT
        data = message[first : first + data_bytes(form, count, length, piece.size)] if start >= 0 else message[:0]
        if len(data) != data_bytes(form, count, length, piece.size):
            raise RefitError(f"a block's data begins at byte {first} of {len(message)} and is cut off")
        yield (begin, form, count, data), length
