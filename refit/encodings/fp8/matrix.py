"""Matrix: weights to quantise, with the memory for their codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Matrix:
    """Whole blocks of the tensor `key`: `weights` `[rows, columns]`, bfloat16 of any strides; `codes` of equal shape;
    `scales`, one per block."""

    key: str
    weights: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
