"""Cases of the quantising kernel, each against plain torch to the bit: on a GPU, else in Triton's interpreter.

Run by test_kernel in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import pytest
import torch

from refit.config.quantisation import Quantisation
from refit.encodings.fp8.kernel import KernelQuantise
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.reference import quantise
from tests.encodings.fp8.weights import RULES, special_blocks, special_values

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SHAPES = {"fp8-block": [(128, 128), (130, 259), (1, 5), (300, 128)], "mxfp8": [(1, 32), (5, 96), (130, 160)]}
ALIGNED, ODD = 16, 7
"""Columns beside codes: rows of shapes that 16 divides begin at multiples of 16 bytes, or do not."""


def outputs(weights: torch.Tensor, quantisation: Quantisation, beside: int = ODD) -> Matrix:
    """Codes and scales inside larger memory, poisoned, with `beside` columns right of the codes."""
    block = quantisation.format
    rows, columns = weights.shape
    codes = torch.full((rows, columns + beside), 0xAA, dtype=torch.uint8, device=DEVICE)
    dtype = getattr(torch, block.scale_dtype)
    shape = (-(-rows // block.rows), -(-columns // block.columns) + 3)
    scales = torch.full((*shape, dtype.itemsize), 0xAA, dtype=torch.uint8, device=DEVICE).view(dtype)[..., 0]
    return Matrix("w", weights, codes.view(torch.float8_e4m3fn)[:, :columns], scales[:, : shape[1] - 3])


@pytest.mark.parametrize(("before", "beside"), [(8, ALIGNED), (3, ODD), (3, ALIGNED), (8, ODD)])
@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.rule)
def test_codes_and_scales_are_those_of_plain_torch(quantisation: Quantisation, before: int, beside: int) -> None:
    sources = []
    for number, (rows, columns) in enumerate(SHAPES[quantisation.dtype]):
        memory = special_values(rows, columns + 16, seed=number).to(DEVICE)
        sources.append(memory[:, before : columns + before])
    sources.append(special_blocks(quantisation).to(DEVICE))
    matrices = [outputs(source, quantisation, beside) for source in sources]
    flags = torch.zeros(len(matrices), dtype=torch.int32, device=DEVICE)
    KernelQuantise(matrices, quantisation, flags).run()
    for matrix in matrices:
        expected = quantise(matrix.weights, quantisation)
        assert torch.equal(matrix.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(_bytes(matrix.scales), _bytes(expected.scales))
        shape = (len(matrix.codes), beside)
        right = torch.as_strided(matrix.codes.view(torch.uint8), shape, matrix.codes.stride(), matrix.codes.shape[1])
        assert (right == 0xAA).all()
    assert flags.tolist() == [0] * (len(matrices))


@pytest.mark.parametrize("quantisation", RULES, ids=lambda each: each.rule)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_flagged(quantisation: Quantisation, value: float) -> None:
    matrices = []
    for number in range(2):
        weights = special_values(130, 160, seed=number).to(DEVICE)
        if number:
            weights[129, 40] = value
        matrices.append(outputs(weights, quantisation))
    flags = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    KernelQuantise(matrices, quantisation, flags).run()
    assert flags.tolist() == [0, 1]
    for matrix in matrices:
        expected = quantise(matrix.weights, quantisation)
        assert torch.equal(matrix.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(_bytes(matrix.scales), _bytes(expected.scales))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
