"""The kernel beside Transformer Engine's own quantisers, for the rules that are theirs. Needs a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from refit.config.quantisation import Quantisation
from refit.encodings.fp8.batch import QuantiseBatch
from refit.encodings.fp8.matrix import Matrix
from tests.encodings.fp8.weights import special_blocks, special_values

SHAPE = (512, 1024)
"""Of whole tiles of every quantiser: Transformer Engine pads the scales of others."""


def missing(oldest_gpu: int) -> str | None:
    """Why Transformer Engine cannot be asked here; None where it can. `oldest_gpu` is a compute capability, 10 x."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if find_spec("triton") is None or find_spec("transformer_engine") is None:
        return "Triton or Transformer Engine is not installed"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < oldest_gpu:
        return f"Transformer Engine quantises so from compute capability {oldest_gpu / 10} on, this is {major}.{minor}"
    return None


def ours(weights: torch.Tensor, rule: Quantisation) -> Matrix:
    block = rule.format
    scales = (weights.shape[0] // block.rows, weights.shape[1] // block.columns)
    matrix = Matrix(
        "w",
        weights,
        torch.empty(weights.shape, dtype=torch.float8_e4m3fn, device=weights.device),
        torch.empty(scales, dtype=getattr(torch, block.scale_dtype), device=weights.device),
    )
    flags = torch.zeros(1, dtype=torch.int32, device=weights.device)
    QuantiseBatch([matrix], rule, flags).run()
    assert flags.item() == 0
    return matrix


def weights_of(rule: Quantisation) -> torch.Tensor:
    """Every magnitude, zeros and subnormals; blocks with a largest value of each kind; an outlier."""
    weights = special_values(*SHAPE, seed=3)
    special = special_blocks(rule)
    columns = min(special.shape[1], SHAPE[1])
    weights[: len(special), :columns] = special[:, :columns]
    weights[-1, -1] = 3e38
    return weights.cuda()


def compare(rule: Quantisation, quantiser: Any) -> None:
    weights = weights_of(rule)
    theirs, found = quantiser(weights), ours(weights, rule)
    scales = found.scales.view(theirs._rowwise_scale_inv.dtype)  # E8M0 as bytes, float32 as it is
    assert torch.equal(theirs._rowwise_scale_inv[: scales.shape[0], : scales.shape[1]], scales)
    assert torch.equal(theirs._rowwise_data, found.codes.view(torch.uint8))


@pytest.mark.skipif(missing(90) is not None, reason=str(missing(90)))
def test_blocks_with_powers_of_two_are_those_of_transformer_engine() -> None:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer, TE_DType

    quantiser = Float8BlockQuantizer(TE_DType.kFloat8E4M3, rowwise=True, columnwise=False)
    compare(Quantisation("fp8-block", "pow2"), quantiser)


@pytest.mark.skipif(missing(100) is not None, reason=str(missing(100)))
def test_mxfp8_is_that_of_transformer_engine() -> None:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer, TE_DType

    quantiser = MXFP8Quantizer(TE_DType.kFloat8E4M3, rowwise=True, columnwise=False)
    compare(Quantisation("mxfp8", "ceil"), quantiser)
