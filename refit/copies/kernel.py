"""The copy kernel: thousands of strided copies in one Triton launch. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from refit.copies.copy import Copy
from refit.copies.table import TILE_BYTES, build_tables


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel copies a tile: one program of `num_warps` warps, `block_words` words at a time.

    A hint is one of Triton's eviction policies or cache modifiers (PTX accepts one of the two), or "" for none.
    "evict_first" keeps data that is not read again soon from displacing other data in the cache.
    """

    tile_bytes: int = TILE_BYTES
    block_words: int = 1024
    num_warps: int = 4
    load_hint: str = "evict_first"
    store_hint: str = "evict_first"


TUNING = Tuning()


@dataclass(frozen=True, slots=True)
class _Launch:
    """The copies of one word size. `table` is one of `build_tables`, on the device."""

    word: int
    table: torch.Tensor
    num_programs: int


class KernelCopies:
    """Copies between memories that `device` can address, mapped memory of peers included. They cannot cast.

    Keeps no tensor alive. The table is on the device when the constructor returns, so that any stream can run it.
    """

    def __init__(
        self, copies: Iterable[Copy], device: torch.device, num_programs: int | None = None, tuning: Tuning = TUNING
    ) -> None:
        self._tuning = tuning
        self._launches = []
        for word, rows in build_tables(copies, tuning.tile_bytes).items():
            num_running = len(rows) if num_programs is None else min(num_programs, len(rows))
            self._launches.append(_Launch(word, torch.from_numpy(rows).to(device), num_running))

    @property
    def table_bytes(self) -> int:
        return sum(launch.table.numel() * launch.table.element_size() for launch in self._launches)

    @property
    def num_launches(self) -> int:
        return len(self._launches)

    def run(self) -> None:
        """Enqueue on the device's current stream."""
        for launch in self._launches:
            with torch.cuda.device_of(launch.table):  # type: ignore[no-untyped-call]
                self._start(launch)

    def _start(self, launch: _Launch) -> None:
        tuning = self._tuning
        _copy_tiles[(launch.num_programs,)](
            launch.table,
            len(launch.table),
            launch.num_programs,
            WORD=launch.word,
            ITEM=_ITEMS[launch.word],
            ITEMS_PER_WORD=launch.word * 8 // _ITEMS[launch.word].primitive_bitwidth,
            BLOCK=tuning.block_words,
            LOAD_EVICTION=_eviction(tuning.load_hint),
            STORE_EVICTION=_eviction(tuning.store_hint),
            LOAD_CACHE=tuning.load_hint.removeprefix(_eviction(tuning.load_hint)),
            STORE_CACHE=tuning.store_hint.removeprefix(_eviction(tuning.store_hint)),
            num_warps=tuning.num_warps,
        )


def _eviction(hint: str) -> str:
    return "" if hint.startswith(".") else hint


# A 16-byte word is four adjacent items of a block. Together with the hint that addresses are multiples of 16, Triton
# compiles it to 16-byte accesses.
_ITEMS = {16: tl.int32, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


# Counts differ between batches, and Triton would compile the kernel again for each specialised value.
# The loops are `while` loops because Triton's interpreter does not accept a tensor as the bound of a `range`.
@triton.jit(do_not_specialize=["num_tiles", "num_programs"])  # type: ignore[untyped-decorator]
def _copy_tiles(
    table: tl.tensor,
    num_tiles: tl.tensor,
    num_programs: tl.tensor,
    WORD: tl.constexpr,
    ITEM: tl.constexpr,
    ITEMS_PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    LOAD_EVICTION: tl.constexpr,
    STORE_EVICTION: tl.constexpr,
    LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
) -> None:
    """Program p copies tiles p, p + num_programs, ... of `table`. A block of BLOCK words may span several rows."""
    tile = tl.program_id(0)
    words = tl.arange(0, BLOCK)
    items = tl.arange(0, ITEMS_PER_WORD)[None, :]
    while tile < num_tiles:
        entry = table + tile.to(tl.int64) * 6
        source = tl.multiple_of(tl.load(entry).to(tl.pointer_type(ITEM)), WORD)
        destination = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(ITEM)), WORD)
        width = tl.load(entry + 3).to(tl.int32)
        num_words = tl.load(entry + 2).to(tl.int32) * width
        source_stride = tl.load(entry + 4)
        destination_stride = tl.load(entry + 5)
        done = 0
        while done < num_words:
            word = done + words
            row = word // width
            column = word - row * width
            present = (word < num_words)[:, None]
            source_items = ((row * source_stride + column) * ITEMS_PER_WORD)[:, None] + items
            destination_items = ((row * destination_stride + column) * ITEMS_PER_WORD)[:, None] + items
            data = tl.load(
                source + source_items, mask=present, cache_modifier=LOAD_CACHE, eviction_policy=LOAD_EVICTION
            )
            tl.store(
                destination + destination_items,
                data,
                mask=present,
                cache_modifier=STORE_CACHE,
                eviction_policy=STORE_EVICTION,
            )
            done += BLOCK
        tile += num_programs
