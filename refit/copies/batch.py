"""Batches of strided copies, executed at once, and the copies of a refit that stay on one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from refit.copies.contiguous import split_runs
from refit.copies.copy import Copy
from refit.memory.views import View, part_within
from refit.memory.weights import Hook, LocalWeights, Part, Storages
from refit.plan.box import Box
from refit.plan.plan import Transfer
from refit.plan.sharding import TensorSpec

if TYPE_CHECKING:
    from refit.copies.kernel import KernelCopies


PIPELINED_BATCH_BYTES = 256 << 20
"""Between the messages of a rank that sends, so that making them does not hold up the next message: copied in 0.2 ms on
an H200, where a launch takes some 20 us. A rank that sends nothing makes a refit of 10 B elements in 8.6 ms with
1 GiB, and in 8.9 ms with this."""

UNSENT_BATCH_BYTES = 1 << 30
"""On a rank that sends nothing. The first batch waits until its weights were found where they were; the GPU copies it
while those of the others are looked for."""


class CopyBatch:
    """Copies that run together, in any order. Built once, run many times. Their destinations must not overlap.

    Copies of one dtype between GPU memories that the current GPU can address run in the copy kernel
    (`refit.copies.kernel`): one launch per word size, with at most `num_programs` programs where given. PyTorch
    executes the others, and all of them where Triton is missing or `kernel` is false. Contiguous runs of at least
    `engine_bytes` are left to the GPU's copy engines, one call each; None leaves them nothing. The batch keeps its
    tensors alive: keep it until its runs have ended.

    `before` and `after` are called before and after the copies, on their stream. `storages` are those of the weights.
    """

    def __init__(
        self,
        copies: Iterable[Copy],
        *,
        kernel: bool = True,
        num_programs: int | None = None,
        engine_bytes: int | None = None,
    ) -> None:
        self._copies = list(copies)
        self.nbytes = sum(copy.nbytes for copy in self._copies)
        split = None if engine_bytes is None else split_runs(self._copies, engine_bytes)
        self._runs = [] if split is None else split.runs
        rest = self._copies if split is None else split.others
        for_kernel, others = _by_executor(rest) if kernel else ([], rest)
        self._destinations = [copy.destination for copy in others]
        self._sources = [copy.source for copy in others]
        self._launched = _kernel_copies(for_kernel, num_programs) if for_kernel else None
        self.before: Hook | None = None
        self.after: Hook | None = None
        self.storages: Storages | None = None

    def is_where_it_was(self) -> bool:
        """Whether all that it copies still has the memory that it had. False where that is not known."""
        return self.storages is not None and not self.storages.have_moved()

    @property
    def table_bytes(self) -> int:
        """Device memory taken by the kernel's table of copies."""
        return 0 if self._launched is None else self._launched.table_bytes

    def run(self) -> None:
        """On CPU, execute on the calling thread. On a GPU, enqueue on the current stream."""
        self.run_pieces()
        self.run_large()
        if self.after is not None:
            self.after()

    def run_large(self) -> None:
        """The part of `run` that copy engines execute, after `before`."""
        if self._runs and self.before is not None:
            self.before()
        for copy in self._runs:
            copy.destination.copy_(copy.source, non_blocking=True)

    def run_pieces(self) -> None:
        """The part of `run` that kernels execute, after `before`."""
        if self.before is not None:
            self.before()
        if self._launched is not None:
            self._launched.run()
        # One call for the list costs 2.1 us per small copy on CPU, a Python loop 2.6 us.
        if self._destinations:
            torch._foreach_copy_(self._destinations, self._sources)


def _by_executor(copies: list[Copy]) -> tuple[list[Copy], list[Copy]]:
    """The copies for the kernel and those for PyTorch."""
    if not any(copy.source.is_cuda for copy in copies) or find_spec("triton") is None:
        return [], copies
    here = torch.cuda.current_device()
    parts: tuple[list[Copy], list[Copy]] = ([], [])
    for copy in copies:
        parts[not _is_for_kernel(copy.destination, copy.source, here)].append(copy)
    return parts


def _is_for_kernel(destination: torch.Tensor, source: torch.Tensor, here: int) -> bool:
    same_bytes = destination.dtype == source.dtype
    on_devices = destination.is_cuda and source.is_cuda
    return same_bytes and on_devices and here in (destination.get_device(), source.get_device())


def _kernel_copies(copies: list[Copy], num_programs: int | None) -> KernelCopies:
    from refit.copies.kernel import KernelCopies

    return KernelCopies(copies, torch.device("cuda", torch.cuda.current_device()), num_programs)


def start_loading_kernels() -> None:
    """Begin, in the background, what the first use of Triton in a process takes longest for.

    Triton hashes its own installation, half a second, before it looks up a compiled kernel. A kernel that is needed
    meanwhile waits for the rest only.
    """
    if find_spec("triton") is not None:
        threading.Thread(target=_hash_triton, name="triton key", daemon=True).start()


def _hash_triton() -> None:
    # The name of a function inside Triton; without it, the first kernel does the work.
    with suppress(ImportError, AttributeError):
        import_module("triton.runtime.cache").triton_key()


def load_kernels(device: torch.device) -> None:
    """Compile and load the copy kernel for 16-byte words, which copy nearly all weights."""
    data = torch.empty(32, dtype=torch.uint8, device=device)
    CopyBatch([Copy(data[16:], data[:16])]).run()
    torch.cuda.synchronize(device)


def weight_copies(tensor: TensorSpec, box: Box, source: LocalWeights, destination: LocalWeights) -> Iterator[Copy]:
    """`box` from weights to weights that this process can both address: one copy per pair of views.

    A source may be made where the destination has it: what lies there already is not copied.
    """
    for part in tensor.memory_boxes(box):
        for target, origin in _meeting(tensor.key, part, source, destination):
            yield from _copies_of(target, origin)


def _meeting(key: str, box: Box, source: LocalWeights, destination: LocalWeights) -> Iterator[tuple[View, View]]:
    """The views of the destination with those of the source that lie in them."""
    for target in destination.views(key, box):
        for origin in source.views(key, target.box):
            yield target, origin


def _copies_of(target: View, origin: View) -> Iterator[Copy]:
    """One, or none where the source is made in the destination's memory."""
    copy = Copy(part_within(target.data, target.box, origin.box), origin.data)
    if not copy.is_in_place:
        yield copy


def zero_copies(tensor: TensorSpec, box: Box, destination: LocalWeights) -> Iterator[Copy]:
    """Zeros into `box`, which no source holds."""
    for view in destination.views(tensor.key, box):
        yield Copy(view.data, torch.zeros((), dtype=view.data.dtype, device=view.data.device).expand_as(view.data))


def local_batches(
    local: Iterable[Transfer],
    zeros: Iterable[Transfer],
    source: LocalWeights | None,
    destination: LocalWeights | None,
    batch_bytes: int,
    num_programs: int | None = None,
    after_writing: Callable[[Iterable[Part]], Hook | None] | None = None,
    sends: bool = True,
) -> list[CopyBatch]:
    """The local copies and zeros of this rank, in batches of about `batch_bytes`, to run between transfers.

    `after_writing` gives their hooks in place of that of `destination`. On a rank that `sends` nothing batches have at
    most UNSENT_BATCH_BYTES; of weights that are made while others move, elsewhere at most PIPELINED_BATCH_BYTES: a
    batch waits for all that it reads.
    """
    is_pipelined = any(weights is not None and weights.is_pipelined for weights in (source, destination))
    if not sends:
        batch_bytes = min(batch_bytes, UNSENT_BATCH_BYTES)
    elif is_pipelined:
        batch_bytes = min(batch_bytes, PIPELINED_BATCH_BYTES)
    found = []
    for parts in _batches((*_local_parts(local, source, destination), *_zero_parts(zeros, destination)), batch_bytes):
        assert destination is not None
        batch = CopyBatch((copy for part in parts for copy in part.copies), num_programs=num_programs)
        owners = [owner for part in parts for owner in part.owners]
        known = [owner for owner in owners if owner is not None]
        if not is_pipelined and len(known) == len(owners):  # `None in owners` would have torch compare each with None
            batch.storages = Storages(known)
        if source is not None:
            batch.before = source.before_reading(part.place for part in parts if part.is_read)
        batch.after = (after_writing or destination.after_writing)(part.place for part in parts)
        found.append(batch)
    return found


@dataclass(frozen=True, slots=True)
class _LocalPart:
    """The copies into the weights at `place`, from the source's weights at that place if `is_read`.

    `nbytes` are those of the place, whether or not they are copied: before the copies they may have to be made.
    """

    place: Part
    nbytes: int
    copies: list[Copy]
    owners: list[torch.Tensor | None]
    is_read: bool


def _local_parts(
    local: Iterable[Transfer], source: LocalWeights | None, destination: LocalWeights | None
) -> Iterator[_LocalPart]:
    for transfer in local:
        assert source is not None
        assert destination is not None
        for box in transfer.tensor.memory_boxes(transfer.box):
            views = list(_meeting(transfer.tensor.key, box, source, destination))
            copies = [copy for target, origin in views for copy in _copies_of(target, origin)]
            owners = [view.owner for pair in views for view in pair]
            nbytes = box.volume * transfer.tensor.itemsize
            yield _LocalPart((transfer.tensor.key, box), nbytes, copies, owners, is_read=True)


def _zero_parts(zeros: Iterable[Transfer], destination: LocalWeights | None) -> Iterator[_LocalPart]:
    for transfer in zeros:
        assert destination is not None
        for box in transfer.tensor.memory_boxes(transfer.box):
            copies = list(zero_copies(transfer.tensor, box, destination))
            owners = [view.owner for view in destination.views(transfer.tensor.key, box)]
            nbytes = box.volume * transfer.tensor.itemsize
            yield _LocalPart((transfer.tensor.key, box), nbytes, copies, owners, is_read=False)


def _batches(parts: Iterable[_LocalPart], batch_bytes: int) -> Iterator[list[_LocalPart]]:
    batch: list[_LocalPart] = []
    nbytes = 0
    for part in parts:
        batch.append(part)
        nbytes += part.nbytes
        if nbytes >= batch_bytes:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
