"""The quantising kernel: thousands of strided matrices in one Triton launch. Importing this module needs Triton.

It converts to float8_e4m3fn by the GPU's own instruction where there is one, and elsewhere (older GPUs, Triton's
interpreter) by integer arithmetic, which takes more time than the memory. Either way its results equal those of
`refit.encodings.fp8.reference` to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from refit.config.quantisation import BlockFormat, Quantisation
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.reference import RECIPROCAL_BITS
from refit.plan.box_array import IntArray

TILE = 128
"""Rows and columns of a tile. A block of `fp8-block` is one tile; a tile of `mxfp8` has 128 x 4 blocks."""

VECTOR = 16
"""Bytes of a GPU's widest access, and the codes that it stores. A tile whose addresses, row strides and columns are all
multiples of it is read and written so: with 12 memory instructions per thread in place of 128."""

NAN = tl.constexpr(0x7FC00000)
"""The bits of NaN in float32."""

CONVERTS_FROM = (8, 9)
"""The compute capability from which GPUs convert to float8_e4m3fn (PTX ISA, `cvt.rn.satfinite.e4m3x2.f32`)."""


class KernelQuantise:
    """Quantises `matrices` on their device: a launch for tiles that are aligned, and one for the others where there are
    any. Keeps no tensor alive.

    `flags` `[num_matrices]`, int32, is set to 1 where a matrix has NaN or infinity, and never cleared.
    """

    def __init__(self, matrices: Sequence[Matrix], quantisation: Quantisation, flags: torch.Tensor) -> None:
        block = quantisation.format
        self._rule = quantisation.rule
        self._converts = flags.is_cuda and torch.cuda.get_device_capability(flags.device) >= CONVERTS_FROM
        self._group = 0 if block.rows > 1 else block.columns
        rows = [_tiles(matrix, block, flags.data_ptr() + 4 * number) for number, matrix in enumerate(matrices)]
        tiles = np.concatenate(rows)
        aligned = _are_aligned(tiles)
        # By whether the tiles are aligned.
        self._tables = {
            kind: torch.from_numpy(tiles[aligned == kind]).to(flags.device) for kind in sorted(set(aligned.tolist()))
        }

    @property
    def table_bytes(self) -> int:
        return sum(table.numel() * table.element_size() for table in self._tables.values())

    def run(self) -> None:
        """Enqueue on the device's current stream."""
        for aligned, table in self._tables.items():
            with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
                _quantise_tiles[(len(table),)](
                    table,
                    ALIGNED=aligned,
                    RULE=self._rule,
                    GROUP=self._group,
                    RECIPROCAL=RECIPROCAL_BITS,
                    TILE=TILE,
                    CONVERTS=self._converts,
                    num_warps=_num_warps(aligned, self._group > 0),
                )


def _num_warps(aligned: bool, in_rows: bool) -> int:
    """Measured on an H200 with TILE 128: a tile that is one block keeps all of it in flight with 4 warps, at 16 bytes
    per access; blocks within rows need more registers for their scales. Narrow accesses need more threads."""
    return 4 if aligned and not in_rows else 16


def _tiles(matrix: Matrix, block: BlockFormat, flag: int) -> IntArray:
    """A row per tile: addresses of weights, codes, scales, flag; rows, columns; row strides of the first three."""
    weights, codes, scales = matrix.weights, matrix.codes, matrix.scales
    num_rows, num_columns = weights.shape
    row, column = (each.ravel() for each in np.mgrid[0:num_rows:TILE, 0:num_columns:TILE])
    table = np.empty((len(row), 9), np.int64)
    for place, (tensor, rows, columns) in enumerate(
        ((weights, row, column), (codes, row, column), (scales, row // block.rows, column // block.columns))
    ):
        table[:, place] = tensor.data_ptr() + (rows * tensor.stride(0) + columns) * tensor.element_size()
        table[:, 6 + place] = tensor.stride(0)
    table[:, 3] = flag
    table[:, 4], table[:, 5] = np.minimum(TILE, num_rows - row), np.minimum(TILE, num_columns - column)
    return table


def _are_aligned(tiles: IntArray) -> NDArray[np.bool_]:
    """Which rows of `_tiles` can be read and written 16 bytes at a time."""
    is_aligned: NDArray[np.bool_] = np.all(tiles[:, [0, 1, 5, 6, 7]] % VECTOR == 0, axis=1)
    return is_aligned


@triton.jit  # type: ignore[untyped-decorator]
def _e4m3(value: tl.tensor, CONVERTS: tl.constexpr) -> tl.tensor:
    """Float32 as the bits of float8_e4m3fn, uint8: to the nearest, ties to even, at most 448; NaN is 0x7F."""
    if CONVERTS:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Adding half a unit, less one where the last bit kept is 0, rounds ties to even. 120 is the difference of biases.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # A unit of float32 at 2**14 is 2**-9, the step of subnormal codes: the addition rounds.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return tl.where(value == value, code | ((bits >> 24) & 0x80), 0x7F).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def _over(dividend: tl.constexpr, divisor: tl.tensor) -> tl.tensor:
    """`dividend / divisor`, rounded to nearest as IEEE 754 says; `/` is approximate on GPUs."""
    return tl.div_rn(tl.full(divisor.shape, dividend, tl.float32), divisor)


@triton.jit  # type: ignore[untyped-decorator]
def _float(bits: tl.tensor) -> tl.tensor:
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _powers_of_two(largest: tl.tensor, RULE: tl.constexpr, RECIPROCAL: tl.constexpr) -> tl.tensor:
    """The E8M0 bits, int32, of the scales of blocks whose largest magnitude has the bfloat16 bits `largest`."""
    if RULE == "ceil":
        product = (_float(largest << 16) * _float(tl.full(largest.shape, RECIPROCAL, tl.int32))).to(
            tl.int32, bitcast=True
        )
        exponent, mantissa = product >> 23, product & 0x7FFFFF
        scale = exponent + tl.where(exponent == 0, mantissa > 0x400000, mantissa > 0).to(tl.int32)
    else:
        tl.static_assert(RULE == "ocp-floor")
        scale = (largest >> 7) - 8
    return tl.minimum(tl.maximum(scale, 0), 254)


@triton.jit  # type: ignore[untyped-decorator]
def _power_factor(scale: tl.tensor) -> tl.tensor:
    """What weights are multiplied by: the reciprocal of a scale of E8M0. It may be subnormal: 2**-127 for 254."""
    return _float(tl.where(scale == 254, 1 << 22, (254 - scale) << 23))


@triton.jit  # type: ignore[untyped-decorator]
def _factor(amax: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """What weights of a block are multiplied by, under a rule with float32 scales. `amax` is the largest magnitude."""
    if RULE == "amax":
        factor = _over(1.0, _amax_scale(amax))
    else:
        factor = _over(448.0, amax) if RULE == "pow2" else _over(1.0, amax) * 448.0
        factor = tl.where(amax == 0.0, 1.0, tl.minimum(factor, 3.4028234663852886e38))
        if RULE == "pow2":
            factor = _float(factor.to(tl.int32, bitcast=True) & 0x7F800000)
        else:
            tl.static_assert(RULE == "amax-inverse")
    return factor


@triton.jit  # type: ignore[untyped-decorator]
def _amax_scale(amax: tl.tensor) -> tl.tensor:
    return tl.div_rn(tl.maximum(amax, 1e-10), tl.full(amax.shape, 448.0, tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _scale(amax: tl.tensor, factor: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """The float32 scale to store of a block with this `_factor`."""
    return _amax_scale(amax) if RULE == "amax" else _over(1.0, factor)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_scaled(
    bits: tl.tensor,
    entry: tl.tensor,
    RULE: tl.constexpr,
    GROUP: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Store the E8M0 scales of a tile whose blocks are GROUP columns of a row.

    Returns the weights over their scales, NaN in blocks that are not finite, and the bits of the largest magnitude.
    """
    groups: tl.constexpr = TILE // GROUP
    largest = tl.max(tl.reshape(bits & 0x7FFF, (TILE, groups, GROUP)), axis=2)
    is_finite = largest < 0x7F80
    scale = _powers_of_two(largest, RULE, RECIPROCAL)
    row, group = tl.arange(0, TILE)[:, None], tl.arange(0, groups)[None, :]
    tl.store(
        tl.load(entry + 2).to(tl.pointer_type(tl.uint8)) + row * tl.load(entry + 8) + group,
        tl.where(is_finite, scale, 0xFF).to(tl.uint8),
        mask=(row < tl.load(entry + 4)) & (group * GROUP < tl.load(entry + 5)),
    )
    weights = tl.reshape(_float(bits << 16), (TILE, groups, GROUP))
    factor = tl.where(is_finite, _power_factor(scale), _float(tl.full((TILE, groups), NAN, tl.int32)))
    scaled = tl.reshape(weights * factor[:, :, None], (TILE, TILE))
    return scaled, tl.max(tl.max(largest, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_scaled(
    bits: tl.tensor, entry: tl.tensor, RULE: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """As `_rows_scaled`, of a tile that is one block, with a float32 scale."""
    largest = tl.max(tl.max(bits & 0x7FFF, axis=1), axis=0)
    is_finite = largest < 0x7F80
    nan = _float(tl.full((1, 1), NAN, tl.int32))
    amax = _float(tl.full((1, 1), 0, tl.int32) + (largest << 16))
    factor = _factor(amax, RULE)
    corner = tl.arange(0, 1)
    tl.store(
        tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + corner[:, None] + corner[None, :],
        tl.where(is_finite, _scale(amax, factor, RULE), nan),
    )
    return _float(bits << 16) * tl.where(is_finite, factor, nan), largest


@triton.jit  # type: ignore[untyped-decorator]
def _quantise_tiles(
    table: tl.tensor,
    ALIGNED: tl.constexpr,
    RULE: tl.constexpr,
    GROUP: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    TILE: tl.constexpr,
    CONVERTS: tl.constexpr,
) -> None:
    """Program p quantises tile p. GROUP is the columns of a block in one row; 0 stands for one block per tile.

    ALIGNED promises `_are_aligned` of every tile, CONVERTS that the GPU is one of CONVERTS_FROM. Strides are int64, so
    offsets are, whatever the size of a tensor.
    """
    entry = table + tl.program_id(0).to(tl.int64) * 9
    source = tl.load(entry).to(tl.pointer_type(tl.int16))
    codes = tl.load(entry + 1).to(tl.pointer_type(tl.uint8))
    num_rows, num_columns = tl.load(entry + 4), tl.load(entry + 5)
    source_stride, codes_stride = tl.load(entry + 6), tl.load(entry + 7)
    if ALIGNED:
        source, codes = tl.multiple_of(source, 16), tl.multiple_of(codes, 16)
        num_columns = tl.multiple_of(num_columns, 16)
        source_stride, codes_stride = tl.multiple_of(source_stride, 16), tl.multiple_of(codes_stride, 16)
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    present = (row < num_rows) & (column < num_columns)
    bits = tl.load(source + row * source_stride + column, mask=present, other=0).to(tl.int32)
    if GROUP:
        scaled, largest = _rows_scaled(bits, entry, RULE, GROUP, RECIPROCAL, TILE)
    else:
        scaled, largest = _tile_scaled(bits, entry, RULE, TILE)
    tl.store(tl.load(entry + 3).to(tl.pointer_type(tl.int32)), 1, mask=largest >= 0x7F80)
    tl.store(codes + row * codes_stride + column, _e4m3(scaled, CONVERTS), mask=present)
