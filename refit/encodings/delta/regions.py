"""Regions: a piece of a message in a GPU's memory, as rows of unsigned integers, and the tables of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from refit.encodings.delta.form import ALIGNMENT, aligned, element_bytes, num_elements, table_end
from refit.memory.codec import Piece


@dataclass(frozen=True, slots=True)
class Region:
    """`num` elements of `size` bytes at `address`, in rows of `width` that begin `stride` elements apart."""

    address: int
    num: int
    size: int
    width: int
    stride: int

    @property
    def is_strided(self) -> bool:
        return self.num > self.width and self.stride != self.width

    @property
    def is_wide(self) -> bool:
        """Whether all rows begin, and end, at multiples of 16 bytes."""
        parts = (self.width, self.stride) if self.is_strided else (self.num,)
        return self.address % ALIGNMENT == 0 and all(part * self.size % ALIGNMENT == 0 for part in parts)


def region_of(view: torch.Tensor, piece: Piece) -> Region | None:
    """The elements of `view`, which holds all of `piece`; None where no rows at one distance do."""
    size, num = element_bytes(piece[0]), num_elements(*piece)
    scale = view.element_size() // size  # an element of 8 bytes is two
    merged: list[tuple[int, int]] = []  # (extent, stride) of dims from the last one on
    for extent, stride in reversed([*zip(view.shape, view.stride(), strict=True)]):
        if extent == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (extent * merged[-1][0], merged[-1][1])
        else:
            merged.append((extent, stride))
    if not merged or merged[0][1] != 1:
        merged.insert(0, (1, 1))  # rows of one element
    if len(merged) > 2:
        return None
    width = merged[0][0] * scale
    stride = merged[1][1] * scale if len(merged) == 2 else width
    return Region(view.data_ptr(), num, size, width, stride)


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks that one launch can take: a table `[blocks, 8]` as `kernel.find_and_pack` wants it."""

    size: int
    wide: bool
    strided: bool
    table: torch.Tensor


def groups_of(regions: Sequence[Region], snapshots: Sequence[int], block: int, device: torch.device) -> list[Group]:
    """The blocks of all regions of a message, with their snapshots' addresses, in as few groups as there are kinds."""
    number, start = 0, 0
    blocks = sum(-(-region.num // block) for region in regions)
    start = table_end(blocks) // ALIGNMENT
    found: dict[tuple[int, bool, bool], list[NDArray[np.int64]]] = {}
    for region, snapshot in zip(regions, snapshots, strict=True):
        begins = np.arange(0, region.num, block, dtype=np.int64)
        rows = np.zeros((len(begins), 8), np.int64)
        rows[:, 0] = region.address if region.is_strided else region.address + begins * region.size
        rows[:, 1] = snapshot + begins * region.size
        rows[:, 2] = begins if region.is_strided else 0
        rows[:, 3] = np.minimum(block, region.num - begins)
        rows[:, 4:6] = (region.width, region.stride)
        rows[:, 6] = number + np.arange(len(begins))
        rows[:, 7] = start + begins * region.size // ALIGNMENT
        found.setdefault((region.size, region.is_wide, region.is_strided), []).append(rows)
        number += len(begins)
        start += aligned(region.num * region.size) // ALIGNMENT
    return [Group(*kind, torch.from_numpy(np.concatenate(rows)).to(device)) for kind, rows in found.items()]


def sizes_of(regions: Sequence[Region], block: int, device: torch.device) -> torch.Tensor:
    """Of each block of a message, int64 `[2, blocks]`: how many elements it has, and their bytes."""
    found = []
    for region in regions:
        num = np.minimum(block, region.num - np.arange(0, region.num, block, dtype=np.int64))
        found.append(np.stack([num, np.full_like(num, region.size)]))
    return torch.from_numpy(np.concatenate(found, axis=1)).to(device)


def offsets_of(sizes: Iterable[int]) -> list[int]:
    """Where parts of `sizes` bytes begin, each aligned, and where they end."""
    offsets = [0]
    for size in sizes:
        offsets.append(aligned(offsets[-1] + size))
    return offsets
