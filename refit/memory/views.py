"""Views: boxes of tensors in this rank's memory, and the parts and matrices in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refit.plan.box import Box


@dataclass(frozen=True, slots=True)
class View:
    """A box of a tensor in this rank's memory. `data` has shape `box.extents` and any strides.

    `owner` is the parameter or buffer that it is a part of, where it is one.
    """

    box: Box
    data: torch.Tensor
    owner: torch.Tensor | None = None


def part_within(data: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    """The part `inner` of `data`, which holds `outer` and has shape `outer.extents`."""
    if inner == outer:
        return data
    first = zip(inner.offsets, outer.offsets, strict=True)
    for dim, ((begin, start), size, whole) in enumerate(zip(first, inner.extents, outer.extents, strict=True)):
        if size != whole:
            data = data.narrow(dim, begin - start, size)
    return data


def in_order(data: torch.Tensor, axes: tuple[int, ...] | None) -> torch.Tensor:
    """`data` with its dims in the order of `axes`, the others, of a single element, behind them. Not a copy."""
    if axes is None:
        return data
    return data.permute(*axes, *(dim for dim in range(data.ndim) if dim not in axes))


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of `tensor` in memory to the end of its last, gaps of its strides included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def matrices_of(box: Box) -> Iterator[Box]:
    """`box`, index by index in all dims but the last two."""
    if all(extent == 1 for extent in box.extents[:-2]):
        yield box
        return
    dim = box.leading_dim
    assert dim is not None
    for index in range(box.offsets[dim], box.ends[dim]):
        yield from matrices_of(box.narrow(dim, index, index + 1))


def matrix_of(data: torch.Tensor) -> torch.Tensor:
    """`data` `[1, ..., rows, columns]` without its leading dims. Not a copy."""
    return data[(0,) * (data.ndim - 2)]
