"""POSIX shared memory as a substrate of the one-sided executor: weights in CPU memory, all ranks on one host."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refit.copies.batch import CopyBatch
from refit.errors import RefitError, UnavailableError, UsageError
from refit.memory.views import span_bytes
from refit.memory.weights import LocalWeights
from refit.plan.plan import RefitPlan
from refit.transport.base import DEFAULTS, Connected, IdleProgram, Program, TransportOptions
from refit.transport.messages import Framing, bucket_bytes
from refit.transport.one_sided.executor import OneSidedProgram
from refit.transport.one_sided.options import ShmOptions
from refit.transport.one_sided.peer_memory import Counter, Put
from refit.transport.one_sided.receive_buffers import DirectBuffers, RingBuffers
from refit.transport.ranks import Ranks
from refit.transport.rendezvous import Rendezvous
from refit.transport.schedule import make_schedule

DIRECTORY = Path("/dev/shm")
SLOTS_PER_PEER = 4
SLOT_BYTES = 1 << 20
"""Small, so that a ring stays in cache between the source's write and the destination's read. With half of it a refit
is no faster, and has twice the messages to prepare: for 4 -> 2 ranks and 240 MB each in 107 ms of CPU time, in place
of 55."""

DIRECT_BATCH_BYTES = 8 << 20
CACHE_LINE = 64


class SharedMemoryTransport:
    name = "shm"

    def check_available(self, options: TransportOptions = DEFAULTS) -> None:
        if not (DIRECTORY.is_dir() and os.access(DIRECTORY, os.W_OK)):
            raise UnavailableError(f"shm needs a writable {DIRECTORY} (Linux): use --refit-method gloo")

    def connect(self, plan: RefitPlan, ranks: Ranks, options: TransportOptions) -> Connected | None:
        """Does nothing: shared memory needs no connection."""
        return None

    def prepare(
        self,
        plan: RefitPlan,
        ranks: Ranks,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        options: TransportOptions,
    ) -> Program:
        """See `Transport.prepare`. Collective: every rank of the plan.

        Raises UnavailableError where the ranks are on several hosts, or shared memory is too small.
        """
        for memory in (source, destination):
            if memory is not None and memory.device.type != "cpu":
                raise UsageError(f"shm moves weights in CPU memory, these are on {memory.device}: use nccl or gloo")
        if ranks.rank not in plan.ranks:
            return IdleProgram()
        buffers, framing = _buffers(plan, destination, options)
        rendezvous = Rendezvous(ranks, f"shm/{plan.digest}", plan.ranks, options.timeout_s)
        shared = SharedMemory(rendezvous)
        schedule = make_schedule(plan, rendezvous.rank, framing)
        buffers.attach(shared, schedule)
        return OneSidedProgram(schedule, shared, buffers, source, destination, options.timeout_s)


def _buffers(
    plan: RefitPlan, destination: LocalWeights | None, options: TransportOptions
) -> tuple[RingBuffers | DirectBuffers, Framing]:
    if options.own_as(ShmOptions).writes_in_place(options.max_bytes):
        return DirectBuffers(destination, map_ahead=map_ahead), Framing(DIRECT_BATCH_BYTES, None)
    slot_bytes = bucket_bytes(plan, options.staging_bytes, SLOTS_PER_PEER, SLOT_BYTES)
    framing = Framing(slot_bytes, None, max_bytes=options.max_bytes)
    return RingBuffers(destination, SLOTS_PER_PEER, slot_bytes), framing


@dataclass(frozen=True, slots=True)
class _Request:
    """What a rank needs, exchanged before anything is allocated."""

    nbytes: int
    free_bytes: int
    token: str


class SharedMemory:
    """The `PeerMemory` of ranks on one host. Each rank has a segment that holds its counters, then its heap."""

    enqueues = False
    local_batch_bytes = 4 << 20

    def __init__(self, rendezvous: Rendezvous, method: str = "shm", instead: str = "gloo") -> None:
        """`method` is named in errors, and `instead` as the method to use in its place.

        Raises UnavailableError, the same on every rank, where the members are on several hosts.
        """
        hosts = rendezvous.ranks.hosts(rendezvous.members)
        if len(hosts) > 1:
            raise UnavailableError(
                f"{method} needs all ranks on one host, these are on {len(hosts)} ({hosts[0]}, {hosts[1]}): "
                f"use {instead}"
            )
        (self._host,) = hosts
        self._method, self._instead = method, instead
        self.rank = rendezvous.rank
        self._rendezvous = rendezvous
        self._index = {rank: number for number, rank in enumerate(rendezvous.members)}
        cells = len(Counter) * len(self._index) * CACHE_LINE
        self._counter_bytes = -(-cells // mmap.PAGESIZE) * mmap.PAGESIZE
        self._heaps: dict[int, torch.Tensor] = {}
        self._counters: dict[int, memoryview] = {}

    def exchange(self, value: Any, wanted: Sequence[int] | None = None) -> dict[int, Any]:
        return self._rendezvous.exchange(value, wanted)

    def allocate(self, nbytes: int) -> torch.Tensor:
        size = self._counter_bytes + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        requests = self.exchange(_Request(size, _free_bytes(), uuid.uuid4().hex[:16]))
        _check_requests(requests, self._method, self._instead)
        paths = {rank: DIRECTORY / f"refit-{request.token}" for rank, request in requests.items()}
        try:
            self._rendezvous.agree(self._attempt(lambda: _create(paths[self.rank], size)))
            self._rendezvous.agree(self._attempt(lambda: self._map(paths)))
        finally:
            # Names are needed only until all ranks have mapped the segments. Without them, the segments of ranks that
            # die later are freed.
            for path in paths.values():
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    path.unlink()
        heap = self._heaps[self.rank][:nbytes]
        map_ahead([heap])
        return heap

    def is_mapped(self, rank: int) -> bool:
        return True

    def peer(self, rank: int) -> torch.Tensor:
        return self._heaps[rank]

    def begin(self, has_new_copies: bool) -> None:
        pass

    def send(self, peer: int, put: Put, value: int) -> None:
        put.batch.run()
        self.raise_counter(peer, Counter.ARRIVED, value)

    def unpack(self, peer: int, batch: CopyBatch) -> None:
        batch.run()

    def copy_local(self, batch: CopyBatch) -> None:
        batch.run()

    def raise_counter(self, peer: int, counter: Counter, value: int) -> None:
        # An aligned store of 8 bytes is atomic. x86-64 keeps the order of stores and the order of loads (TSO: Intel SDM
        # 3A, 8.2.2; libc's non-temporal copies end in a fence), so data written earlier is visible earlier.
        _fence()
        self._counters[peer][self._cell(counter, self.rank)] = value

    def reached(self, peer: int, counter: Counter, value: int) -> bool:
        if self._counters[self.rank][self._cell(counter, peer)] < value:
            return False
        _fence()
        return True

    def finish(self) -> None:
        pass

    def barrier(self) -> None:
        self.exchange(None)

    def close(self) -> None:
        self._heaps.clear()
        self._counters.clear()

    def _cell(self, counter: Counter, about: int) -> int:
        """Index, in 8-byte units, of the counter kept for rank `about`. Each has a cache line of its own."""
        return (counter * len(self._index) + self._index[about]) * (CACHE_LINE // 8)

    def _attempt(self, action: Callable[[], None]) -> RefitError | None:
        """Run `action`. Operating system errors are returned as a RefitError that can be sent to the other ranks."""
        try:
            action()
        except OSError as error:
            return UnavailableError(
                f"{self._method} on {self._host}: {error}: all ranks must share one {DIRECTORY}; use {self._instead} "
                "otherwise"
            )
        return None

    def _map(self, paths: dict[int, Path]) -> None:
        for rank, path in paths.items():
            with path.open("r+b") as file:
                segment = mmap.mmap(file.fileno(), 0)
            self._counters[rank] = memoryview(segment)[: self._counter_bytes].cast("q")
            # The tensor keeps the mapping alive; the mapping ends with the last tensor.
            self._heaps[rank] = torch.frombuffer(segment, dtype=torch.uint8)[self._counter_bytes :]


def map_ahead(regions: Iterable[torch.Tensor]) -> None:
    """Map the pages of shared memory in which `regions` lie, in a third of the time that their page faults take.

    Where the kernel cannot (before Linux 5.14), they are mapped when they are used.
    """
    pages = sorted(
        (region.data_ptr() // mmap.PAGESIZE, -(-(region.data_ptr() + span_bytes(region)) // mmap.PAGESIZE))
        for region in regions
        if region.numel()
    )
    begin = end = 0
    for first, last in (*pages, (sys.maxsize, sys.maxsize)):
        if first > end:
            _madvise(begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE, MADV_POPULATE_READ)
            begin = first
        end = max(end, last)


MADV_POPULATE_READ = 22
"""madvise(2). Reading is enough: shared memory is mapped writable at once, since nobody keeps track of writes."""

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_FENCE = threading.Lock()
_FENCE.acquire()


def _fence() -> None:
    """Keep memory accesses before the call in order with those after it, on processors that may reorder (Arm).

    Releasing a lock and acquiring it again does that.
    """
    if not _KEEPS_ORDER:
        _FENCE.release()
        _FENCE.acquire()


_KEEPS_ORDER = platform.machine() in ("x86_64", "AMD64")


def _create(path: Path, nbytes: int) -> None:
    """`nbytes` are whole pages."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        # Allocate the pages now: a later write to a page that cannot be allocated would kill the process. Writing
        # zeros, with mapping, takes three quarters of the CPU time of posix_fallocate, which zeroes at first faults.
        page, most = bytes(mmap.PAGESIZE), os.sysconf("SC_IOV_MAX")
        while nbytes > 0:
            nbytes -= os.writev(descriptor, [page] * min(most, -(-nbytes // mmap.PAGESIZE)))
    finally:
        os.close(descriptor)


def _check_requests(requests: dict[int, _Request], method: str, instead: str) -> None:
    """Raises UnavailableError where the segments are impossible: the same on every rank."""
    needed = sum(request.nbytes for request in requests.values())
    free = min(request.free_bytes for request in requests.values())
    if needed > free:
        raise UnavailableError(
            f"{method} needs {needed / 2**20:.1f} MiB of {DIRECTORY}, {free / 2**20:.1f} MiB are free: enlarge it "
            f"(mount -o remount,size=..., docker --shm-size), lower --staging-mib, or use --refit-method {instead}"
        )


def _free_bytes() -> int:
    status = os.statvfs(DIRECTORY)
    return status.f_bavail * status.f_frsize
