"""`--profile-refit`: record the GPU kernels and copies of one extra refit.

Recording slows the host down, so this refit is not part of the measured times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from refit.results.refit import Activity

KINDS = {
    "_copy_tiles": "copy kernel",
    "ncclDevKernel": "NCCL kernel",
    "nvshmem": "NVSHMEM signal",
    "Memcpy": "memcpy",
    "elementwise": "PyTorch copy",
}
"""Part of a kernel's name -> the kind that is reported."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One kernel or copy on a CUDA stream, in nanoseconds of the profiler's clock."""

    stream: int
    kind: str
    start_ns: int
    end_ns: int


def profiled(run: Callable[[], object]) -> list[Activity]:
    """Run once and record. Returns the activities of this process's GPU in the order in which they began."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recording:
        run()
        torch.cuda.synchronize()
    return activities(_intervals(recording.profiler.kineto_results.events()))


def _intervals(events: Iterable[Any]) -> list[Interval]:
    return [
        Interval(
            event.device_resource_id(), kind_of(event.name()), event.start_ns(), event.start_ns() + event.duration_ns()
        )
        for event in events
        if event.device_type() == torch._C._autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]


def kind_of(name: str) -> str:
    """The kind a kernel's name belongs to, or the name itself."""
    return next((kind for part, kind in KINDS.items() if part in name), name)


def activities(intervals: Iterable[Interval]) -> list[Activity]:
    """Intervals added up by stream and kind."""
    groups: dict[tuple[int, str], list[Interval]] = defaultdict(list)
    for interval in sorted(intervals, key=lambda interval: interval.start_ns):
        groups[interval.stream, interval.kind].append(interval)
    start = min((members[0].start_ns for members in groups.values()), default=0)
    return [
        Activity(
            stream,
            kind,
            len(members),
            _union_ns(members) / 1e9,
            (members[0].start_ns - start) / 1e9,
            (max(member.end_ns for member in members) - start) / 1e9,
        )
        for (stream, kind), members in groups.items()
    ]


def _union_ns(intervals: Iterable[Interval]) -> int:
    """Length of the union of intervals, which are sorted by start."""
    total = end = 0
    for interval in intervals:
        total += max(0, interval.end_ns - max(end, interval.start_ns))
        end = max(end, interval.end_ns)
    return total
