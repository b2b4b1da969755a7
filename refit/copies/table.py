"""Tables of strided copies for the copy kernel (`refit.copies.kernel`). Arithmetic on addresses, no device work.

A box [4, 6] of bfloat16, the first six columns of a source with eight, into a destination of its own:

    source         ######..     16 bytes from row to row     ###### is a run: contiguous at both sides
                   ######..
                   ######..                                  Runs(dims=(Dim(4, destination=12, source=16),), width=12)
                   ######..
    destination    ######       12 bytes from row to row

12 and 16 are multiples of 4, so a word has 4 bytes if both addresses are too. In tiles of at most 24 bytes it is two
rows of the table, of two runs each:

    source, destination (bytes)    runs    words per run    source, destination stride (words)
              0,  0                 2            3                      4, 3
             32, 24                 2            3                      4, 3
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refit.copies.copy import Copy

TILE_BYTES = 128 << 10
"""The most bytes that a table row copies. Large copies are cut evenly, so that their rows copy at least half of it; a
row's own 48 bytes are 0.07 % of that."""

WORD_BYTES = (16, 8, 4, 2, 1)
SPLIT_BYTES = 128
"""Runs are cut at multiples of this: one cache line of a GPU."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Dim:
    """`size` steps of `destination` and `source` bytes."""

    size: int
    destination: int
    source: int


@dataclass(frozen=True, slots=True)
class Runs:
    """A copy without its addresses: a run of `width` bytes, contiguous at both sides, repeated over `dims`."""

    dims: tuple[Dim, ...]
    width: int

    @property
    def step_bits(self) -> int:
        """All byte distances of the copy, combined by bitwise or. A power of two that divides this divides them all."""
        bits = self.width
        for dim in self.dims:
            bits |= dim.destination | dim.source
        return bits


def runs_of(shape: Sequence[int], destination: Sequence[int], source: Sequence[int], item_bytes: int) -> Runs:
    """The longest runs that are contiguous at both sides. `destination` and `source` are strides in elements."""
    dims = [
        Dim(n, d * item_bytes, s * item_bytes) for n, d, s in zip(shape, destination, source, strict=True) if n != 1
    ]
    # From the inside out, whatever order the tensor's dims have: a transposed source is as contiguous as its memory.
    dims.sort(key=lambda dim: dim.destination)
    width, outer = item_bytes, list[Dim]()
    for dim in dims:
        # Grows the run: this dim's steps are exactly as far apart, at both sides, as the run is wide.
        if not outer and dim.destination == dim.source == width:
            width *= dim.size
        elif outer and _continues(dim, outer[-1]):
            outer[-1] = Dim(outer[-1].size * dim.size, outer[-1].destination, outer[-1].source)
        else:
            outer.append(dim)
    return Runs(tuple(outer), width)


def tiles_of(runs: Runs, word: int, tile_bytes: int = TILE_BYTES) -> Ints:
    """The tiles of a copy, `[num_tiles, 6]`.

    Columns: source and destination offset in bytes, rows, words per row, source and destination stride in words. The
    rows of a tile go along the longest dim, so that one tile covers many short runs. Every index of the other dims has
    tiles of its own. `word`, in bytes, must divide every distance of `runs`.
    """
    # A program copies a tile as rows x words: one dim of runs. Other dims would take divisions for each word.
    longest = max(runs.dims, key=lambda dim: dim.size, default=Dim(1, 0, 0))
    others = [dim for dim in runs.dims if dim is not longest]
    cuts, widths = _even_spans(runs.width // word, max(1, tile_bytes // word), max(1, SPLIT_BYTES // word))
    starts, heights = _even_spans(longest.size, max(1, tile_bytes // (int(widths[0]) * word)), 1)
    # Every tile starts at a sum: one step of each other dim, one start along the longest, one cut of the run. Cuts come
    # last and vary fastest, heights next: `tiles[:, 2]` and `tiles[:, 3]` repeat in that order.
    offsets = np.zeros((1, 2), np.int64)
    for dim in others:
        offsets = _added(offsets, _steps(np.arange(dim.size), dim.source, dim.destination))
    offsets = _added(offsets, _steps(starts, longest.source, longest.destination))
    offsets = _added(offsets, _steps(cuts * word, 1, 1))
    tiles = np.empty((len(offsets), 6), np.int64)
    tiles[:, :2] = offsets
    tiles[:, 2] = np.tile(np.repeat(heights, len(widths)), len(tiles) // (len(heights) * len(widths)))
    tiles[:, 3] = np.tile(widths, len(tiles) // len(widths))
    tiles[:, 4:] = longest.source // word, longest.destination // word
    return tiles


def build_tables(copies: Iterable[Copy], tile_bytes: int = TILE_BYTES) -> dict[int, Ints]:
    """Word size in bytes -> table `[num_tiles, 6]` as of `tiles_of`, with addresses instead of offsets.

    Every copy gets the widest word that its addresses, strides and width allow; only sizes that occur are keys. The
    tiles of a layout are computed once for all copies that have it.
    """
    parts: dict[int, list[_Repeated]] = defaultdict(list)
    for runs, addresses in _by_runs(copies):
        # The lowest bit of all distances is the largest power of two that divides each. 16 among them bounds it:
        # addresses 0 and 64, width and strides 12, 12, 16: 0 | 64 | 28 | 16 = 0b1011100, lowest bit 4.
        bits = addresses[:, 0] | addresses[:, 1] | runs.step_bits | WORD_BYTES[0]
        words = bits & -bits
        for word in WORD_BYTES:
            chosen = addresses[words == word]
            if len(chosen):
                parts[word].append(_Repeated(tiles_of(runs, word, tile_bytes), chosen))
    return {word: _table(repeated) for word, repeated in parts.items()}


@dataclass(frozen=True, slots=True)
class _Repeated:
    """One set of tiles, placed at every row (source, destination) of `addresses`."""

    tiles: Ints
    addresses: Ints


def _table(parts: Sequence[_Repeated]) -> Ints:
    table = np.empty((sum(len(part.tiles) * len(part.addresses) for part in parts), 6), np.int64)
    start = 0
    for part in parts:
        rows = table[start : start + len(part.tiles) * len(part.addresses)]
        places = rows.reshape(len(part.addresses), len(part.tiles), 6)
        np.add(part.tiles[:, :2], part.addresses[:, None], out=places[:, :, :2])
        places[:, :, 2:] = part.tiles[:, 2:]
        start += len(rows)
    return table


def _by_runs(copies: Iterable[Copy]) -> Iterable[tuple[Runs, Ints]]:
    """Each layout with the source and destination addresses of its copies, `[num_copies, 2]`. Skips empty copies."""
    found: dict[tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int], list[int]] = defaultdict(list)
    for copy in copies:
        source, destination = copy.source, copy.destination
        layout = (destination.shape, source.shape, destination.stride(), source.stride(), destination.element_size())
        found[layout] += (source.data_ptr(), destination.data_ptr())
    for (shape, source_shape, to_strides, from_strides, item_bytes), addresses in found.items():
        assert shape == source_shape, f"a copy of {source_shape} into {shape}"
        if 0 not in shape:
            yield runs_of(shape, to_strides, from_strides, item_bytes), np.array(addresses, np.int64).reshape(-1, 2)


def _continues(dim: Dim, inner: Dim) -> bool:
    return dim.destination == inner.destination * inner.size and dim.source == inner.source * inner.size


def _even_spans(total: int, longest: int, multiple: int) -> tuple[Ints, Ints]:
    """Starts and lengths of spans that divide `total`: as few as possible, about equal, none above `longest`.

    All lengths but the last are multiples of `multiple` where `longest` is one.
    """
    # 10 in spans of at most 4 are 4, 4, 2 where they must be even numbers, and 4, 4, 2 again where not: three spans of
    # ceil(10 / 3). 9 are 3, 3, 3, not 4, 4, 1, which would keep a program busy with little.
    num_spans = -(-total // longest)
    length = min(longest, -(-total // num_spans // multiple) * multiple)
    starts = np.arange(0, total, length)
    return starts, np.minimum(length, total - starts)


def _steps(counts: Ints, source: int, destination: int) -> Ints:
    steps: Ints = counts[:, None] * np.array([source, destination])
    return steps


def _added(offsets: Ints, steps: Ints) -> Ints:
    """The sums of every row of `offsets` with every row of `steps`; rows of `steps` vary fastest."""
    return (offsets[:, None] + steps[None]).reshape(-1, 2)
