"""Peak memory of refits, above the level before them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PeakMemory:
    """Peak bytes within `watch` blocks, above the level when this object was constructed.

    On a GPU: the peak of torch's allocator, plus the growth of other device memory (NVSHMEM's heap, NCCL's buffers) by
    any process. On a GPU that `is_shared` with other ranks only the former, since the allocators of those ranks would
    count as growth. On a CPU: the process's resident memory. Its high-water mark is reset through
    /proc/self/clear_refs (Linux, proc(5)); `extra_bytes` is None where that is not allowed.
    """

    def __init__(self, device: torch.device, *, is_shared: bool = False) -> None:
        self._device = device
        self._is_shared = is_shared
        self.extra_bytes: int | None = 0
        self._baseline = used_bytes(device)
        self._past_torch = past_torch(device)

    @contextmanager
    def watch(self) -> Iterator[None]:
        if not reset_peak(self._device):
            self.extra_bytes = None
        yield
        if self.extra_bytes is not None:
            taken = 0 if self._is_shared else past_torch(self._device) - self._past_torch
            self.extra_bytes = max(self.extra_bytes, peak_bytes(self._device) - self._baseline + taken)


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: of torch's allocator on a GPU, resident memory of the process on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def reset_peak(device: torch.device) -> bool:
    """Start a new peak. False where that is not allowed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_cached(device: torch.device) -> None:
    """Give a GPU's memory that torch's allocator has, but no tensor, to whoever allocates beside it: NCCL, CUDA IPC."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def past_torch(device: torch.device) -> int:
    """Bytes in use on a GPU outside torch's allocator; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _status_bytes(field: str) -> int:
    """A size in /proc/self/status, in bytes; 0 where there is none (not Linux)."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def total_memory_bytes() -> int:
    """Physical memory of this host, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
