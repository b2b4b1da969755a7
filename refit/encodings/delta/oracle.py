"""The oracle's part of a delta: each iteration changes exactly the asked share of what the one before has left.

The units that change (elements, rows, or experts) stand in a circle, in an order that is a hash's. Each iteration
changes the next stretch of it, the asked share of its length. So how often a unit has changed follows from its place
and the iteration alone, in integers: with unit u of a circle of R, after iterations whose shares add up to p / q,

    (u q + p R) // (R q)  times

An example: R = 4, and a share of 1 / 2. Units 0 to 3 have changed 0 0 1 1 times after one iteration, 1 1 1 1 after two.
In every iteration the share of R, rounded down or up, changes; over the iterations nothing is lost to rounding.

A unit's values are those of the part inside for the number of its changes, with that number's lowest bit as their own
lowest: a value differs from the one before for certain. Real weights are the same in all iterations: of these, the
lowest bit is turned over with each change.
"""

from __future__ import annotations

import math
import zlib
from fractions import Fraction

import torch

from refit.config.delta import DeltaOptions, Pattern
from refit.config.scenario import Scenario
from refit.encodings.oracle import OraclePart, WrappedPart
from refit.memory.rows import Rows
from refit.plan.sharding import TensorSpec

CIRCLE_BITS = 20
"""Units beyond 2**20 stand in several circles of so many, and one for the rest."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def oracle(inner: OraclePart, scenario: Scenario) -> OraclePart:
    """The part of the scenario's share and pattern."""
    assert scenario.delta is not None
    return DeltaPart(inner, scenario.delta)


class DeltaPart(WrappedPart):
    """Refits that build on the one before."""

    keeps_base = True

    def __init__(self, inner: OraclePart, options: DeltaOptions) -> None:
        super().__init__(inner)
        self.options = options

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        times = self._times_changed(tensor, block, iteration)
        if self.is_real:
            found = self.inner.values(tensor, block, iteration)
            bits = found.view(_BITS[found.element_size()])
            return bits.bitwise_xor((times & 1).to(bits.dtype)).view(found.dtype)
        least, most = int(times.min()), int(times.max())
        found = self.inner.values(tensor, block, least)
        for number in range(least + 1, most + 1):
            found = torch.where(times == number, self.inner.values(tensor, block, number), found)
        bits = found.view(_BITS[found.element_size()])
        return bits.bitwise_and_(~1).bitwise_or_((times & 1).to(bits.dtype)).view(found.dtype)

    def _times_changed(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        """How often each element, `[rows, columns]` or broadcast to it, has changed, int64."""
        shape = tensor.shape
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        if self.options.pattern is Pattern.EXPERTS and tensor.stacked:
            unit, num = (block.row_numbers // (rows // shape[0]))[:, None], shape[0]
        elif self.options.pattern is Pattern.ROWS and len(shape) > 1:
            unit, num = block.row_numbers[:, None], rows
        else:
            column = torch.arange(block.data.shape[1], device=block.row_numbers.device) + block.first_column
            unit, num = block.row_numbers[:, None] * columns + column[None, :], rows * columns
        return times_changed(tensor.key, unit, num, self.options.changed_until(iteration))


def times_changed(key: str, unit: torch.Tensor, num: int, changed: Fraction) -> torch.Tensor:
    """How often each `unit`, int64, of `num` of the tensor called `key` has changed when `changed` have, all told."""
    circle = unit >> CIRCLE_BITS
    length = torch.where(circle < num >> CIRCLE_BITS, 1 << CIRCLE_BITS, num & ((1 << CIRCLE_BITS) - 1))
    length = length.clamp_(min=1)  # padding may lie beyond the last unit
    place = _place(zlib.crc32(key.encode()), unit & ((1 << CIRCLE_BITS) - 1), circle, length)
    return (place * changed.denominator + changed.numerator * length) // (length * changed.denominator)


def _place(seed: int, unit: torch.Tensor, circle: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The place of a unit in its circle: a permutation of 0 to `length` - 1.

    In a full circle multiplications with odd numbers and shifts, each of which permutes 2**20 numbers. In the last one
    as many times around as the golden ratio asks for, or nearly: by a number without a common factor.
    """
    mask = (1 << CIRCLE_BITS) - 1
    mixed = (unit * (2 * (seed & 0xFFFF) + 0x9E375) + circle * 0x3C6EF) & mask
    mixed = mixed ^ (mixed >> 11)
    mixed = (mixed * 0x5BD1E95) & mask
    mixed = mixed ^ (mixed >> 9)
    rest = int(length.min())
    if rest > mask:
        return mixed
    step = next(step for step in range(max(1, round(rest * 0.618)), 2 * rest + 1) if math.gcd(step, rest) == 1)
    return torch.where(length > mask, mixed, (unit * step + seed) % length)
