"""Values that encode their position: a hash of the tensor's key, the row, the column and the iteration.

Any shard can be filled or checked without building the whole tensor, on any device.
"""

from __future__ import annotations

import zlib

import torch

from refit.memory.rows import Rows
from refit.plan.sharding import TensorSpec

# (integer view, hash bits kept, bits set) per float dtype: sign, mantissa and the low three exponent bits vary.
_PATTERNS = {
    torch.bfloat16: (torch.int16, 0x83FF, 0x3C00),
    torch.float16: (torch.int16, 0x9FFF, 0x2000),
    torch.float32: (torch.int32, 0x83FFFFFF, 0x3C000000),
}


def hashed(tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
    """Values `[rows, columns]`, in the dtype of `tensor`: finite, 2**-7 <= |value| < 2 in the dtypes of weights."""
    bits = hash_bits(tensor.key, iteration, block)
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if dtype in _PATTERNS:
        view, keep, fixed = _PATTERNS[dtype]
        if view is torch.int16:
            bits = bits.bitwise_right_shift_(16).to(torch.int16)
        return bits.bitwise_and_(_signed(keep, view)).bitwise_or_(fixed).view(dtype)
    if dtype is torch.bool:
        return bits < 0
    return bits.to(dtype)  # integers, and float64 with whole values


def _signed(pattern: int, dtype: torch.dtype) -> int:
    width = torch.iinfo(dtype).bits
    return pattern - (1 << width) if pattern >> (width - 1) else pattern


def _seed(key: str, iteration: int) -> int:
    return zlib.crc32(key.encode()) * 0x1_0000_0001 + iteration * 0x5851F42D4C957F2D


def hash_bits(key: str, iteration: int, block: Rows) -> torch.Tensor:
    """32 hash bits per element `[rows, columns]`, int32, of the tensor or other thing called `key`.

    Rows are seeded with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), columns mixed in with multiply and
    xor-shift (the finaliser of MurmurHash3); int64 and int32 arithmetic wraps in torch as it does in C.
    """
    seed = _seed(key, iteration)
    row = block.row_numbers * _signed(0x9E3779B97F4A7C15, torch.int64) + _signed(seed & (2**64 - 1), torch.int64)
    row = (row ^ ((row >> 30) & 0x3_FFFF_FFFF)) * _signed(0xBF58476D1CE4E5B9, torch.int64)
    row = (row ^ ((row >> 27) & 0x1F_FFFF_FFFF)) * _signed(0x94D049BB133111EB, torch.int64)
    row_seeds = (row >> 32).to(torch.int32)
    columns = torch.arange(block.data.shape[1], dtype=torch.int64, device=row.device) + block.first_column
    column_seeds = (columns * 0x9E3779B1).bitwise_and_(0xFFFFFFFF)
    column_seeds = torch.where(column_seeds >= 2**31, column_seeds - 2**32, column_seeds).to(torch.int32)
    bits = row_seeds[:, None] + column_seeds[None, :]
    bits.mul_(_signed(0x85EBCA6B, torch.int32))
    bits.bitwise_xor_(bits >> 15)
    return bits.mul_(_signed(0xC2B2AE35, torch.int32))
