"""Copies that are contiguous at both ends, merged with their neighbours: the work of a GPU's copy engines.

A copy engine moves one contiguous run faster than any kernel, but each run costs it some 4 us. Weights of consecutive
experts often lie one behind the other at both ends, and are then one run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from refit.copies.copy import Copy


@dataclass(frozen=True, slots=True)
class Split:
    """`runs` are contiguous copies of bytes (uint8, one-dimensional); `others` are all other copies, as given."""

    runs: list[Copy]
    others: list[Copy]


def split_runs(copies: Iterable[Copy], least_bytes: int) -> Split:
    """Merge contiguous copies that follow one another in both memories; take out the runs of `least_bytes` or more."""
    plain: list[Copy] = []
    others: list[Copy] = []
    for copy in copies:
        (plain if _is_contiguous(copy) else others).append(copy)
    runs: list[Copy] = []
    for group in _adjacent(plain):
        if sum(copy.nbytes for copy in group) >= least_bytes:
            runs.append(_merged(group))
        else:
            others += group
    return Split(runs, others)


def _is_contiguous(copy: Copy) -> bool:
    source, destination = copy.source, copy.destination
    return source.dtype == destination.dtype and source.is_contiguous() and destination.is_contiguous()


def _adjacent(copies: list[Copy]) -> Iterable[list[Copy]]:
    """Groups of copies of which each continues the one before, in the source and in the destination."""
    group: list[Copy] = []
    for copy in sorted(copies, key=lambda each: each.destination.data_ptr()):
        if group and not _continues(copy, group[-1]):
            yield group
            group = []
        group.append(copy)
    if group:
        yield group


def _continues(copy: Copy, before: Copy) -> bool:
    return all(
        one.data_ptr() == other.data_ptr() + before.nbytes
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        for one, other in ((copy.source, before.source), (copy.destination, before.destination))
    )


def _merged(group: list[Copy]) -> Copy:
    nbytes = sum(copy.nbytes for copy in group)
    return Copy(_bytes_from(group[0].destination, nbytes), _bytes_from(group[0].source, nbytes))


def _bytes_from(first: torch.Tensor, nbytes: int) -> torch.Tensor:
    """`nbytes` of the storage of `first`, from its first element on."""
    storage = first.untyped_storage()
    start = first.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage, start, (nbytes,), (1,))
