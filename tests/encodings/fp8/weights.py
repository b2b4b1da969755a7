"""Weights that test the rules: every magnitude of bfloat16, zeros, subnormals, and largest values at block edges."""

from __future__ import annotations

import torch

from refit.config.quantisation import BLOCK_FORMATS, Quantisation

RULES = [Quantisation(dtype, rule) for dtype, block in BLOCK_FORMATS.items() for rule in block.rules]


def special_values(rows: int, columns: int, seed: int) -> torch.Tensor:
    """`[rows, columns]`, bfloat16: finite values of magnitudes that vary by block, zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    exponents = torch.randint(-130, 120, (-(-rows // 32), -(-columns // 32)), generator=generator)
    exponents = exponents.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
    result = torch.ldexp(values, exponents).bfloat16()
    result[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    return result.where(result.isfinite(), torch.zeros((), dtype=torch.bfloat16))


def special_blocks(quantisation: Quantisation) -> torch.Tensor:
    """A row of blocks, each with one largest value in a corner: all mantissas, and exponents up to the ends."""
    block = quantisation.format
    tops = [0.0, 1e-45, 1.2e-38, 2.0**-126, 1e-10, 9.9e-11, 448.0, 447.0, 449.0, 2.0**127, 3.3895e38, 1.75, 1.7421875]
    tops += [1.7578125, 0.875, 2.0**-9 * 1.75, 1.0, 1.9921875]
    result = torch.zeros(block.rows, block.columns * len(tops), dtype=torch.bfloat16)
    for number, top in enumerate(tops):
        begin = number * block.columns
        corner = ((0, 0), (0, -1), (-1, 0), (-1, -1))[number % 4]
        ramp = torch.linspace(-0.99, 0.99, block.rows * block.columns).view(block.rows, block.columns) * top
        part = result[:, begin : begin + block.columns]
        part.copy_(ramp.bfloat16())
        part[corner] = top
    return result
