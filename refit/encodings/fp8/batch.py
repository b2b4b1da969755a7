"""Matrices quantised together: in one launch on a GPU, in plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from refit.config.quantisation import CODES_DTYPE, Quantisation
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.reference import quantise

if TYPE_CHECKING:
    from refit.encodings.fp8.kernel import KernelQuantise

STRIP_ELEMENTS = 1 << 20
"""Elements that plain torch quantises at once, which bounds its temporaries."""


class QuantiseBatch:
    """Quantises `matrices` together. Built once, run many times. Keeps its tensors alive.

    On a GPU with Triton the kernel does it, in one launch, on the current stream. Otherwise plain torch does.
    `flags` `[num_matrices]`, int32, on the matrices' device, is set to 1 where a matrix has NaN or infinity, and never
    cleared.
    """

    def __init__(self, matrices: Sequence[Matrix], quantisation: Quantisation, flags: torch.Tensor) -> None:
        self._matrices = tuple(matrices)
        self._quantisation = quantisation
        self._flags = flags
        self._launched = self._kernel() if flags.is_cuda and find_spec("triton") is not None else None

    def run(self) -> None:
        """Quantise all matrices. On a GPU: enqueue."""
        if self._launched is not None:
            self._launched.run()
            return
        for number, matrix in enumerate(self._matrices):
            self._run_in_torch(matrix, self._flags[number : number + 1])

    def _kernel(self) -> KernelQuantise | None:
        from refit.encodings.fp8.kernel import KernelQuantise

        if not self._matrices or not all(_suits_kernel(matrix) for matrix in self._matrices):
            return None
        return KernelQuantise(self._matrices, self._quantisation, self._flags)

    def _run_in_torch(self, matrix: Matrix, flag: torch.Tensor) -> None:
        block = self._quantisation.format
        num_rows, num_columns = matrix.weights.shape
        step = max(1, STRIP_ELEMENTS // num_columns // block.rows) * block.rows
        for begin in range(0, num_rows, step):
            done = quantise(matrix.weights[begin : begin + step], self._quantisation)
            matrix.codes[begin : begin + step].copy_(done.codes)
            first = begin // block.rows
            matrix.scales[first : first + len(done.scales)].copy_(done.scales)
            flag.logical_or_(~done.is_finite.all())


def load_quantise_kernel(device: torch.device, quantisation: Quantisation) -> None:
    """Compile and load what a batch of this rule runs, which may wait for all work of a GPU."""
    block, flags = quantisation.format, torch.zeros(2, dtype=torch.int32, device=device)
    scales = torch.empty(1, 1, dtype=getattr(torch, block.scale_dtype), device=device)
    weights = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    codes = torch.empty(1, 64, dtype=getattr(torch, CODES_DTYPE), device=device)
    for first in (0, 1):  # aligned to vectors and not
        part = slice(first, first + 32)
        QuantiseBatch([Matrix("", weights[:, part], codes[:, part], scales)], quantisation, flags[:1]).run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _suits_kernel(matrix: Matrix) -> bool:
    """Whether rows are contiguous."""
    return all(
        tensor.shape[1] == 1 or tensor.stride(1) == 1 for tensor in (matrix.weights, matrix.codes, matrix.scales)
    )
