"""The arithmetic of every rule in plain torch, exact to the bit on any device. The kernel and the oracle follow it.

All steps are single IEEE operations in float32: no sum, no fused multiply-add, no approximate division. The rules are
those of `refit.config.quantisation.BLOCK_FORMATS`, which says who uses each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refit.config.quantisation import BlockFormat, Quantisation

LARGEST = 448.0
"""The largest value of float8_e4m3fn."""

RECIPROCAL_BITS = 0x3B124925
"""1 / 448 in float32, which Transformer Engine multiplies by."""

NOT_FINITE = 0x7F80
"""The bits of infinity in bfloat16. Of two magnitudes the larger has larger bits, and NaN has larger ones still."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """`codes` `[rows, columns]`, float8_e4m3fn; `scales` `[rows / block rows, columns / block columns]`, rounded up.

    `is_finite` has the shape of `scales`. Codes and scale of a block with NaN or infinity are NaN.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    is_finite: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Scales:
    """Per block, float32: what is stored, as float32 or as the bits of E8M0, and what weights are multiplied by."""

    stored: torch.Tensor
    factor: torch.Tensor


def quantise(matrix: torch.Tensor, quantisation: Quantisation) -> Quantised:
    """Quantise `matrix` `[rows, columns]`, bfloat16, which begins on the grid of blocks.

    The last block of a dim may be smaller than the others: its largest value is that of its own elements.
    """
    return quantise_by(largest_bits(matrix, quantisation.format), matrix, quantisation)


def largest_bits(matrix: torch.Tensor, block: BlockFormat) -> torch.Tensor:
    """The bits of the largest magnitude of every block of `matrix`, int16: of two parts of a block, the larger bits are
    those of the whole."""
    return _in_blocks(matrix.contiguous().view(torch.int16) & 0x7FFF, block).amax(dim=(1, 3))


def quantise_by(largest: torch.Tensor, matrix: torch.Tensor, quantisation: Quantisation) -> Quantised:
    """Quantise `matrix`, of whose blocks the `largest_bits` are given: it may hold parts of them."""
    block, is_finite = quantisation.format, largest < NOT_FINITE
    amax = largest.view(torch.bfloat16).float()
    scales = _RULES[quantisation.rule](amax)
    factor = _spread(scales.factor, block, matrix.shape)
    scaled = (matrix.float() * factor).clamp(-LARGEST, LARGEST)
    codes = scaled.to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[~_spread(is_finite, block, matrix.shape)] = 0x7F
    if block.scale_dtype == "float8_e8m0fnu":
        stored = torch.where(is_finite, scales.stored, 0xFF).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        stored = torch.where(is_finite, scales.stored, torch.nan)
    return Quantised(codes, stored, is_finite)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, block: BlockFormat) -> torch.Tensor:
    """Codes x scales `[rows, columns]`, float32."""
    return codes.float() * _spread(scales.float(), block, codes.shape)


def _in_blocks(matrix: torch.Tensor, block: BlockFormat) -> torch.Tensor:
    """`[block rows, rows of a block, block columns, columns of a block]`, with zeros beyond the matrix."""
    rows, columns = matrix.shape
    missing = (-columns % block.columns, -rows % block.rows)
    padded = torch.nn.functional.pad(matrix, (0, missing[0], 0, missing[1]))
    return padded.view(
        (rows + missing[1]) // block.rows, block.rows, (columns + missing[0]) // block.columns, block.columns
    )


def _spread(per_block: torch.Tensor, block: BlockFormat, shape: torch.Size) -> torch.Tensor:
    """A value per block, as a value per element `[rows, columns]`."""
    rows = per_block.repeat_interleave(block.rows, 0)[: shape[0]]
    return rows.repeat_interleave(block.columns, 1)[:, : shape[1]]


def _amax(amax: torch.Tensor) -> _Scales:
    # Not `/ LARGEST`: by a number, torch divides on GPUs as it multiplies by the number's reciprocal.
    scale = amax.clamp(min=1e-10) / torch.full_like(amax, LARGEST)
    return _Scales(scale, scale.reciprocal())


def _amax_inverse(amax: torch.Tensor) -> _Scales:
    """Rounded twice: torch executes NeMo-RL's `448 / amax`, a number over a tensor, as `amax.reciprocal() * 448`."""
    factor = _or_largest(amax.reciprocal() * LARGEST, amax)
    return _Scales(factor.reciprocal(), factor)


def _pow2(amax: torch.Tensor) -> _Scales:
    """As Transformer Engine: 448 / amax rounded down to a power of two by clearing its mantissa."""
    factor = _or_largest(torch.full_like(amax, LARGEST) / amax, amax)
    factor = (factor.view(torch.int32) & 0x7F800000).view(torch.float32)
    return _Scales(factor.reciprocal(), factor)


def _or_largest(factor: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """1 for blocks of zeros; the largest float32 where `factor` overflows, as Transformer Engine has both."""
    return torch.where(amax == 0, 1.0, factor).clamp(max=torch.finfo(torch.float32).max)


def _ceil(amax: torch.Tensor) -> _Scales:
    """As Transformer Engine's float_to_e8m0: the exponent of amax / 448, plus 1 unless that is a power of two."""
    reciprocal = torch.tensor(RECIPROCAL_BITS, dtype=torch.int32, device=amax.device).view(torch.float32)
    bits = (amax * reciprocal).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    rounds_up = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
    return _e8m0(exponent + rounds_up)


def _ocp_floor(amax: torch.Tensor) -> _Scales:
    return _e8m0((amax.view(torch.int32) >> 23) - 8)


def _e8m0(biased: torch.Tensor) -> _Scales:
    """`biased` exponents, int32. The factor is 2 ** (127 - biased), exact in float32 for every byte of E8M0."""
    stored = biased.clamp(min=0, max=254)
    inverse = 254 - stored
    factor = torch.where(inverse == 0, 1 << 22, inverse << 23).to(torch.int32).view(torch.float32)
    return _Scales(stored, factor)


_RULES: dict[str, Callable[[torch.Tensor], _Scales]] = {
    "amax": _amax,
    "amax-inverse": _amax_inverse,
    "pow2": _pow2,
    "ceil": _ceil,
    "ocp-floor": _ocp_floor,
}
