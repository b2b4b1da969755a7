"""Encoder and decoder of messages between GPUs' memories. They only enqueue. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl

from refit.copies.batch import CopyBatch
from refit.copies.copy import Copy
from refit.encodings.delta.counts import Counts
from refit.encodings.delta.form import GPU_BLOCK, table_end
from refit.encodings.delta.kernels.apply import apply_changes
from refit.encodings.delta.kernels.pack import find_and_pack
from refit.encodings.delta.regions import Group, Region, groups_of, offsets_of, region_of, sizes_of
from refit.encodings.delta.versions import Versions
from refit.memory.codec import Piece
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights

ITEMS = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels take a block of 32 x `lanes` elements, each in a program. Measured on an H200."""

    lanes: int = 256
    num_warps: int = 2
    apply_lanes: int = 128
    apply_warps: int = 4

    @property
    def block(self) -> int:
        return 32 * self.lanes


class Timer:
    """The time on the device between two calls on one stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        if torch.cuda.is_available():
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._has_run = False

    def begin(self) -> None:
        for event in self._events[:1]:
            event.record()

    def end(self) -> None:
        for event in self._events[1:]:
            event.record()
        self._has_run = bool(self._events)

    def seconds(self) -> float:
        """Of the last run, which has ended."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._has_run else 0.0


TUNING = Tuning()
assert TUNING.block >= GPU_BLOCK


class _Gathered:
    """A piece as a region: where it is, or in memory of its own, with the copies in and out of it."""

    def __init__(self, weights: LocalWeights, piece: Piece) -> None:
        tensor, box = piece
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        views = weights.views(tensor.key, box)
        only = views[0].data if len(views) == 1 and views[0].data.dtype is dtype else None
        found = None if only is None else region_of(only, piece)
        self.copy_in = self.copy_out = CopyBatch(())
        self.memory: torch.Tensor | None = None
        if found is None:
            self.memory = torch.empty(box.extents, dtype=dtype, device=views[0].data.device)
            pairs = [(part_within(self.memory, box, view.box), view.data) for view in views]
            self.copy_in = CopyBatch(Copy(inside, outside) for inside, outside in pairs)
            self.copy_out = CopyBatch(Copy(outside, inside) for inside, outside in pairs)
            found = region_of(self.memory, piece)
        assert found is not None, "new memory is contiguous"
        self.region: Region = found


class GpuEncoder:
    """Compares the pieces of one message with a snapshot of what was sent last, and packs what has changed.

    `counts` `[blocks]`, int32, are the changes of each block in the last run.
    """

    def __init__(
        self,
        weights: LocalWeights,
        pieces: Sequence[Piece],
        versions: Versions,
        *,
        on_host: bool = False,
        tuning: Tuning = TUNING,
    ) -> None:
        self._versions, self._tuning = versions, tuning
        self._weights = weights  # the tables have addresses only
        self._gathered = [_Gathered(weights, piece) for piece in pieces]
        regions = [each.region for each in self._gathered]
        *begins, end = offsets_of(region.num * region.size for region in regions)
        device = weights.device
        self.snapshot = (
            torch.empty(end, dtype=torch.uint8, pin_memory=True)
            if on_host
            else torch.empty(end, dtype=torch.uint8, device=device)
        )
        addresses = [self.snapshot.data_ptr() + begin for begin in begins]
        self._groups = groups_of(regions, addresses, tuning.block, device)
        self.sizes = sizes_of(regions, tuning.block, device)
        blocks = self.sizes.shape[1]
        self._data_begins = table_end(blocks)
        self._full_end = self._data_begins + end
        self.counts = torch.zeros(blocks, dtype=torch.int32, device=device)
        self.timer = Timer()

    @property
    def snapshot_bytes(self) -> int:
        return self.snapshot.numel()

    def pack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        versions, tuning = self._versions, self._tuning
        self.timer.begin()
        length.fill_(self._full_end if versions.is_full else self._data_begins)
        for each in self._gathered:
            each.copy_in.run()
        for group in self._groups:
            find_and_pack[(len(group.table),)](
                group.table,
                payload,
                length,
                self.counts,
                versions.version,
                versions.base,
                ITEM=ITEMS[group.size],
                SIZE=group.size,
                LANES=tuning.lanes,
                WIDE=group.wide,
                STRIDED=group.strided,
                FULL=versions.is_full,
                num_warps=tuning.num_warps,
            )
        self.timer.end()


class GpuDecoder:
    """Applies what one message says to the weights. `flag` `[1]`, int32, is set where it is not what was agreed."""

    def __init__(
        self,
        weights: LocalWeights,
        pieces: Sequence[Piece],
        versions: Versions,
        flag: torch.Tensor,
        *,
        tuning: Tuning = TUNING,
    ) -> None:
        self._versions, self._tuning, self._flag = versions, tuning, flag
        self._weights = weights
        self._gathered = [_Gathered(weights, piece) for piece in pieces]
        regions = [each.region for each in self._gathered]
        self.timer = Timer()
        self._groups: list[Group] = groups_of(regions, [0] * len(regions), tuning.block, weights.device)

    def unpack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        versions, tuning = self._versions, self._tuning
        self.timer.begin()
        for each in self._gathered:
            each.copy_in.run()
        for group in self._groups:
            apply_changes[(len(group.table),)](
                group.table,
                payload,
                payload.numel(),
                versions.version,
                versions.expected,
                self._flag,
                ITEM=ITEMS[group.size],
                SIZE=group.size,
                BLOCK=tuning.block,
                LANES=tuning.apply_lanes,
                STRIDED=group.strided,
                num_warps=tuning.apply_warps,
            )
        for each in self._gathered:
            each.copy_out.run()
        self.timer.end()


def add_counts(encoders: Sequence[GpuEncoder], counts: Counts, *, is_full: bool) -> None:
    """What the encoders packed in the run that has ended. Waits for the device."""
    if not encoders:
        return
    changed = torch.cat([encoder.counts for encoder in encoders]).long()
    num, size = torch.cat([encoder.sizes for encoder in encoders], dim=1)
    positions, masks = (changed + 1) // 2 * 4, (num + 31) // 32 * 4
    places = torch.minimum(positions, masks)
    is_whole = places + changed * size >= num * size
    place_bytes = places.masked_fill(is_whole, 0).sum()
    value_bytes = torch.where(is_whole, num * size, changed * size).sum()
    counts.add(*torch.stack([num.sum(), changed.sum() * (not is_full), place_bytes, value_bytes]).tolist())
