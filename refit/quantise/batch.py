"""Matrices quantised together: in one launch on a GPU, in plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from refit.config.quantisation import Quantisation
from refit.errors import RefitError
from refit.quantise.matrix import Matrix
from refit.quantise.reference import quantise

if TYPE_CHECKING:
    from refit.quantise.kernel import KernelQuantise

STRIP_ELEMENTS = 1 << 20
"""Elements that plain torch quantises at once, which bounds its temporaries."""


class QuantiseBatch:
    """Quantises `matrices` together. Built once, run many times. Keeps its tensors alive.

    On a GPU with Triton the kernel does it, in one launch, on the current stream. Otherwise plain torch does.
    """

    def __init__(self, matrices: Sequence[Matrix], quantisation: Quantisation) -> None:
        self._matrices = tuple(matrices)
        self._quantisation = quantisation
        device = self._matrices[0].weights.device if self._matrices else torch.device("cpu")
        self._flags = torch.zeros(len(self._matrices), dtype=torch.int32, device=device)
        self._launched = self._kernel() if device.type == "cuda" and find_spec("triton") is not None else None

    def run(self) -> None:
        """Quantise all matrices. On a GPU: enqueue."""
        if self._launched is not None:
            self._launched.run()
            return
        for number, matrix in enumerate(self._matrices):
            self._run_in_torch(matrix, self._flags[number : number + 1])

    def check_finite(self) -> None:
        """Raise RefitError, naming the tensors, where runs so far have met NaN or infinity. Waits for the device."""
        found = torch.nonzero(self._flags).flatten().tolist()
        if found:
            keys = sorted({self._matrices[number].key for number in found})
            raise RefitError(
                f"{len(keys)} tensors have NaN or infinity, which FP8 codes cannot hold: {', '.join(keys[:3])}: "
                "check the source's weights"
            )

    def _kernel(self) -> KernelQuantise | None:
        from refit.quantise.kernel import KernelQuantise

        if not all(_suits_kernel(matrix) for matrix in self._matrices):
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


def _suits_kernel(matrix: Matrix) -> bool:
    """Whether rows are contiguous."""
    return all(
        tensor.shape[1] == 1 or tensor.stride(1) == 1 for tensor in (matrix.weights, matrix.codes, matrix.scales)
    )
