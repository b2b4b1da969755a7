"""Many strided copies executed at once, and the pairs of views they run over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from refit.models.weights import LocalWeights, View
from refit.plan.box import Box
from refit.plan.plan import Transfer
from refit.plan.sharding import TensorSpec
from refit.transport.messages import Message, memory_boxes

if TYPE_CHECKING:
    from refit.copies.kernel import KernelCopies


@dataclass(frozen=True, slots=True)
class Copy:
    """`destination.copy_(source)`: equal shapes, any strides, a cast where the dtypes differ."""

    destination: torch.Tensor
    source: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.destination.element_size()


class CopyBatch:
    """A list of copies, built once and run often. Writes must not overlap; order is not kept.

    One launch per word size does all copies between GPU memories that the current GPU addresses and that keep their
    dtype (`copy_kernel`), spread over at most `num_programs` programs where given. PyTorch does the others; everything
    where Triton is missing or `kernel` is false. Tensors stay alive with the batch: keep it until its runs have ended.
    """

    def __init__(self, copies: Iterable[Copy], *, kernel: bool = True, num_programs: int | None = None) -> None:
        self._copies = list(copies)
        self.nbytes = sum(copy.nbytes for copy in self._copies)
        launched, left = _shared_out(self._copies) if kernel else ([], self._copies)
        self._destinations = [copy.destination for copy in left]
        self._sources = [copy.source for copy in left]
        self._launched = _kernel_copies(launched, num_programs) if launched else None

    @property
    def table_bytes(self) -> int:
        """Device memory that describes the copies to the kernel."""
        return 0 if self._launched is None else self._launched.table_bytes

    def run(self) -> None:
        """Execute on the calling thread, or enqueue on the current stream."""
        if self._launched is not None:
            self._launched.run()
        # One call for the list costs 2.1 us per small copy on CPU, a Python loop 2.6 us.
        if self._destinations:
            torch._foreach_copy_(self._destinations, self._sources)


def _shared_out(copies: list[Copy]) -> tuple[list[Copy], list[Copy]]:
    """Those for the kernel and those for PyTorch."""
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


def load_kernels(device: torch.device) -> None:
    """Compile and load the copy kernel for the widest words, which nearly all weights are copied by."""
    some = torch.empty(32, dtype=torch.uint8, device=device)
    CopyBatch([Copy(some[16:], some[:16])]).run()
    torch.cuda.synchronize(device)


def pack_copies(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> list[Copy]:
    """From the weights into `buffer`, uint8 of at least `message.nbytes`."""
    return [Copy(place, view.data) for place, view in _places(message, memory, buffer)]


def unpack_copies(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> list[Copy]:
    """From `buffer`, uint8 of at least `message.nbytes`, into the weights."""
    return [Copy(view.data, place) for place, view in _places(message, memory, buffer)]


def weight_copies(tensor: TensorSpec, box: Box, source: LocalWeights, destination: LocalWeights) -> Iterator[Copy]:
    """From weights to weights, both addressable here; one copy per pair of views."""
    for part in memory_boxes(tensor, box):
        for target in destination.views(tensor.key, part):
            for origin in source.views(tensor.key, target.box):
                yield Copy(_within(target.data, target.box, origin.box), origin.data)


def zero_copies(transfer: Transfer, destination: LocalWeights) -> Iterator[Copy]:
    """Zeros over a box that no source holds."""
    for part in memory_boxes(transfer.tensor, transfer.box):
        for view in destination.views(transfer.tensor.key, part):
            yield Copy(view.data, torch.zeros((), dtype=view.data.dtype, device=view.data.device).expand_as(view.data))


def local_batches(
    local: Iterable[Transfer],
    zeros: Iterable[Transfer],
    source: LocalWeights | None,
    destination: LocalWeights | None,
    batch_bytes: int,
    num_programs: int | None = None,
) -> list[CopyBatch]:
    """All copies that stay on this rank, in batches of about `batch_bytes` so that they can be spread over a run."""
    copies: list[Copy] = []
    for transfer in local:
        assert source is not None
        assert destination is not None
        copies += weight_copies(transfer.tensor, transfer.box, source, destination)
    for transfer in zeros:
        assert destination is not None
        copies += zero_copies(transfer, destination)
    return [CopyBatch(batch, num_programs=num_programs) for batch in _batches(copies, batch_bytes)]


def _batches(copies: Iterable[Copy], batch_bytes: int) -> Iterator[list[Copy]]:
    batch: list[Copy] = []
    nbytes = 0
    for copy in copies:
        batch.append(copy)
        nbytes += copy.nbytes
        if nbytes >= batch_bytes:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _places(message: Message, memory: LocalWeights, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, View]]:
    for piece in message.pieces:
        dtype: torch.dtype = getattr(torch, piece.tensor.dtype)
        place = buffer[piece.offset : piece.offset + piece.nbytes].view(dtype).view(piece.box.extents)
        for view in memory.views(piece.tensor.key, piece.box):
            yield _within(place, piece.box, view.box), view


def _within(data: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    return data if inner == outer else data[inner.slices_within(outer)]
