"""The oracle's part of FP8: values that test every kind of block, and the codes and scales that the rule makes of them.

Every code and every scale is compared with those that the named rule gives, in plain torch, for the source's values of
the whole block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from refit.config.quantisation import SCALE_SUFFIX, Quantisation, scale_key
from refit.config.scenario import Scenario
from refit.encodings.fp8.reference import quantise
from refit.encodings.fp8.strips import strips_of
from refit.encodings.oracle import PLAIN, Comparison, Index, OraclePart, Values, WrappedPart
from refit.encodings.values import hash_bits
from refit.memory.rows import Rows
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.plan.quantised import Grid
from refit.plan.sharding import TensorSpec

# What the values of a block are multiplied by: zeros, subnormals (2**-126), or what a forward pass can use.
_MAGNITUDES = (0.0, 2.0**-126, *(2.0**-exponent for exponent in range(7)), *(2.0**-exponent for exponent in range(7)))
_OUTLIER = 8.0


def oracle(inner: OraclePart, scenario: Scenario) -> OraclePart:
    """The part of the scenario's FP8 destination."""
    quantisation = scenario.destination.quantisation
    assert quantisation is not None
    return Fp8Part(quantisation, inner)


class Fp8Part(WrappedPart):
    """Refits to codes and scales."""

    def __init__(self, quantisation: Quantisation, inner: OraclePart = PLAIN) -> None:
        super().__init__(inner)
        self.quantisation = quantisation

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        """Those of tensors that become codes differ in magnitude from block to block, with zeros, subnormals, and in
        every fourth block a largest value in a corner. Real weights stay as they are."""
        found = self.inner.values(tensor, block, iteration)
        if self.is_real or not self.quantisation.quantises(tensor.key, tensor.shape):
            return found
        return _varied(found, tensor, block, iteration, Grid(tensor.shape, self.quantisation.format))

    def comparisons(
        self,
        values: Values,
        held: LocalWeights,
        shard: LocalShard,
        source: Mapping[str, TensorSpec],
        start: int | None = None,
    ) -> Iterator[Comparison]:
        """The codes of `shard` and their scales, strip by strip of whole blocks. `start` counts rows of blocks."""
        key = shard.tensor.key
        if key.endswith(SCALE_SUFFIX) and key.removesuffix(SCALE_SUFFIX) in source:
            return  # compared with the codes
        if not self.quantisation.quantises(key, shard.tensor.shape):
            yield from self.inner.comparisons(values, held, shard, source, start)
            return
        weights = replace(source[key], dtype="bfloat16")  # what is quantised, whatever the dtype of what is held
        for strip in strips_of(held, shard, self.quantisation, start):
            expected = quantise(values(weights, strip.codes), self.quantisation)
            yield Comparison(key, expected.codes, strip.codes.data, _index_from(strip.box))
            yield Comparison(scale_key(key), expected.scales, strip.scales, _index_from(strip.scale_box))


def _index_from(box: Box) -> Index:
    """For a matrix that is `box`."""
    return lambda row, column: (*box.offsets[:-2], box.offsets[-2] + row, box.offsets[-1] + column)


def _varied(found: torch.Tensor, tensor: TensorSpec, block: Rows, iteration: int, grid: Grid) -> torch.Tensor:
    device, (rows, columns) = found.device, grid.steps[-2:]
    row = block.row_numbers % tensor.shape[-2]
    column = torch.arange(found.shape[1], device=device) + block.first_column
    block_row = block.row_numbers // tensor.shape[-2] * grid.scale_shape[-2] + row // rows
    block_column = column // columns
    first = block.first_column // columns
    shape = torch.empty(len(row), int(block_column[-1]) + 1 - first, device="meta")
    bits = hash_bits(tensor.key + " block", iteration, Rows(block_row, first, shape))
    factor = (1 + (bits & 0x7F) / 128) * torch.tensor(_MAGNITUDES, device=device)[(bits >> 7) & 15]
    place = block_column - first
    bits, factor = bits[:, place], factor[:, place]
    corner_row = torch.where((bits >> 13) & 1 == 1, rows - 1, 0) == (row % rows)[:, None]
    corner_column = torch.where((bits >> 14) & 1 == 1, columns - 1, 0) == (column % columns)[None, :]
    outlier = ((bits >> 11) & 3 == 0) & corner_row & corner_column
    return (found.float() * factor * torch.where(outlier, _OUTLIER, 1.0)).to(found.dtype)
