"""RefitPlan: which box of which tensor moves from which rank to which. Checked for completeness when built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from refit.errors import PlanError
from refit.plan.box import Box
from refit.plan.sharding import Sharding, TensorSharding, TensorSpec

ZEROS = -1
"""The source of a transfer without one: the destination zeroes vocabulary padding that the source does not have."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Transfer:
    """`box` of a tensor, read on rank `source` and written on rank `destination`. On one rank it is a local copy."""

    tensor: TensorSpec
    source_dtype: str
    box: Box
    source: int
    destination: int

    @property
    def nbytes(self) -> int:
        """Bytes written at the destination, in its dtype."""
        return self.box.volume * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The transfers of one rank. Each tuple is in plan order, which is the same at both ends of a pair."""

    rank: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    local: tuple[Transfer, ...]
    zeros: tuple[Transfer, ...]


@dataclass(frozen=True)
class RefitPlan:
    """Transfers as columns: row `i` moves `extents[i]` elements at `offsets[i]` of tensor `keys[tensor[i]]`.

    Shapes: tensor, source, destination `[num_transfers]`; offsets, extents `[num_transfers, max_dims]`. Tensors with
    fewer dims have trailing offsets 0 and extents 1. The constructor raises PlanError unless every destination element
    is written exactly once and every read lies inside a box that its source holds.
    """

    source_sharding: Sharding
    destination_sharding: Sharding
    keys: tuple[str, ...]
    tensor: IntArray
    source: IntArray
    destination: IntArray
    offsets: IntArray
    extents: IntArray

    def __post_init__(self) -> None:
        _check_reads(self)
        _check_disjoint(self)
        _check_volumes(self)

    @classmethod
    def from_rows(cls, source: Sharding, destination: Sharding, rows: Sequence[tuple[int, int, int, Box]]) -> RefitPlan:
        """Build from rows (tensor index in `destination.tensors`, source, destination, box), in any order."""
        dims = max((len(row[3].offsets) for row in rows), default=1)
        rows = sorted(rows, key=lambda row: (row[0], row[3].offsets, row[2]))
        blank, unit = (0,) * dims, (1,) * dims
        return cls(
            source_sharding=source,
            destination_sharding=destination,
            keys=tuple(destination.tensors),
            tensor=np.array([row[0] for row in rows], np.int64),
            source=np.array([row[1] for row in rows], np.int64),
            destination=np.array([row[2] for row in rows], np.int64),
            offsets=_column([row[3].offsets + blank[len(row[3].offsets) :] for row in rows], dims),
            extents=_column([row[3].extents + unit[len(row[3].extents) :] for row in rows], dims),
        )

    def __len__(self) -> int:
        return len(self.tensor)

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.destination_sharding.tensors[key] for key in self.keys)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of both sides, ascending."""
        return tuple(sorted({*self.source_sharding.ranks, *self.destination_sharding.ranks}))

    @cached_property
    def nbytes(self) -> IntArray:
        """Bytes each transfer writes, `[num_transfers]`."""
        itemsizes = np.array([spec.itemsize for spec in self.specs], np.int64)
        return np.asarray(self.extents.prod(axis=1) * itemsizes[self.tensor], np.int64)

    @property
    def is_local(self) -> npt.NDArray[np.bool_]:
        return np.equal(self.source, self.destination)

    @property
    def is_wire(self) -> npt.NDArray[np.bool_]:
        """Transfers that leave their source rank."""
        return np.not_equal(self.source, self.destination) & np.not_equal(self.source, ZEROS)

    def transfers(self, rows: IntArray | None = None) -> Iterator[Transfer]:
        """The transfers as objects: all, or those with the indices `rows`."""
        for row in range(len(self)) if rows is None else rows.tolist():
            spec = self.specs[self.tensor[row]]
            dims = len(spec.shape)
            box = Box(tuple(self.offsets[row, :dims].tolist()), tuple(self.extents[row, :dims].tolist()))
            source = int(self.source[row])
            source_dtype = spec.dtype if source == ZEROS else self.source_sharding.tensors[spec.key].dtype
            yield Transfer(spec, source_dtype, box, source, int(self.destination[row]))

    def for_rank(self, rank: int) -> RankPlan:
        """The transfers that `rank` sends, receives, copies locally and zeroes."""

        def select(mask: npt.NDArray[np.bool_]) -> tuple[Transfer, ...]:
            return tuple(self.transfers(np.flatnonzero(mask)))

        return RankPlan(
            rank,
            sends=select(self.is_wire & (self.source == rank)),
            receives=select(self.is_wire & (self.destination == rank)),
            local=select(self.is_local & (self.destination == rank)),
            zeros=select((self.source == ZEROS) & (self.destination == rank)),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the columns and keys. Equal digests mean equal transfers."""
        sha = hashlib.sha256("\n".join(self.keys).encode())
        for column in (self.tensor, self.source, self.destination, self.offsets, self.extents):
            sha.update(np.ascontiguousarray(column).tobytes())
        return sha.hexdigest()

    @cached_property
    def casts(self) -> dict[str, tuple[str, str]]:
        """Tensors whose dtype the refit changes: key -> (source dtype, destination dtype)."""
        theirs = self.source_sharding.tensors
        return {
            key: (theirs[key].dtype, spec.dtype)
            for key, spec in self.destination_sharding.tensors.items()
            if theirs[key].dtype != spec.dtype
        }


def _column(rows: list[tuple[int, ...]], dims: int) -> IntArray:
    return np.array(rows, np.int64).reshape(-1, dims)


def _check_reads(plan: RefitPlan) -> None:
    """Raise PlanError unless every read and every write lies inside one box that its rank holds."""
    for side, sharding, column in (
        ("read", plan.source_sharding, plan.source),
        ("written", plan.destination_sharding, plan.destination),
    ):
        inside = column == ZEROS
        for tensor_sharding, rows in _rows_by_sharding(plan, sharding):
            inside[rows] |= _held_by(tensor_sharding, column[rows], plan.offsets[rows], plan.extents[rows])
        if not inside.all():
            row = int(np.flatnonzero(~inside)[0])
            raise PlanError(f"{_row_text(plan, row)} is {side} on rank {column[row]}, which does not hold it")


def _rows_by_sharding(plan: RefitPlan, sharding: Sharding) -> Iterator[tuple[TensorSharding, IntArray]]:
    """Each distinct TensorSharding with the indices of the rows of all tensors that have it."""
    number: dict[int, int] = {}
    by_key = [sharding.by_key[key] for key in plan.keys]
    numbers = np.array([number.setdefault(id(tensor_sharding), len(number)) for tensor_sharding in by_key], np.int64)
    row_numbers = numbers[plan.tensor]
    order = np.argsort(row_numbers, kind="stable")
    bounds = np.searchsorted(row_numbers[order], np.arange(len(number) + 1))
    distinct = {id(tensor_sharding): tensor_sharding for tensor_sharding in by_key}
    for identity, index in number.items():
        yield distinct[identity], order[bounds[index] : bounds[index + 1]]


def _held_by(
    tensor_sharding: TensorSharding, ranks: IntArray, offsets: IntArray, extents: IntArray
) -> npt.NDArray[np.bool_]:
    """For each row, whether one box that `ranks[row]` holds contains the row's box.

    Shapes: ranks `[num_rows]`; offsets, extents `[num_rows, max_dims]`.
    """
    held = sorted((rank, shard.box) for shard in tensor_sharding.shards for rank in shard.ranks)
    holders = np.array([rank for rank, _ in held], np.int64)
    dims = len(held[0][1].offsets)
    lows = np.array([box.offsets for _, box in held], np.int64).reshape(-1, dims)
    highs = np.array([box.ends for _, box in held], np.int64).reshape(-1, dims)
    low, high = offsets[:, :dims], offsets[:, :dims] + extents[:, :dims]
    first = np.searchsorted(holders, ranks)
    inside = np.zeros(len(ranks), np.bool_)
    # A rank holds few boxes of one tensor (two for gate and up): compare the k-th box of all rows at once.
    for k in range(int(np.bincount(holders).max())):
        entry = np.minimum(first + k, len(holders) - 1)
        within = (lows[entry] <= low).all(1) & (high <= highs[entry]).all(1)
        inside |= (holders[entry] == ranks) & within
    return inside


def _check_disjoint(plan: RefitPlan) -> None:
    """Raise PlanError where two writes to the same tensor on the same rank overlap."""
    order = np.lexsort((plan.destination, plan.tensor))
    group = np.stack([plan.tensor[order], plan.destination[order]], 1)
    offsets, ends = plan.offsets[order], (plan.offsets + plan.extents)[order]
    # Compare every row with its k-th successor, until no two rows that far apart share a group.
    for k in range(1, len(order)):
        same = (group[:-k] == group[k:]).all(1)
        if not same.any():
            return
        overlap = same & (np.maximum(offsets[:-k], offsets[k:]) < np.minimum(ends[:-k], ends[k:])).all(1)
        if overlap.any():
            row = int(order[int(np.flatnonzero(overlap)[0])])
            raise PlanError(f"{_row_text(plan, row)} is written twice on rank {plan.destination[row]}")


def _check_volumes(plan: RefitPlan) -> None:
    """Raise PlanError unless the writes to each tensor on each rank have the volume that the rank holds.

    Writes are disjoint and inside the held boxes (checked before), so equal volumes mean complete coverage.
    """
    index = {rank: column for column, rank in enumerate(plan.destination_sharding.ranks)}
    written = np.zeros((len(plan.keys), len(index)), np.int64)
    columns = np.array([index[rank] for rank in plan.destination.tolist()], np.int64)
    np.add.at(written, (plan.tensor, columns), plan.extents.prod(axis=1))
    held = np.zeros_like(written)
    for tensor, key in enumerate(plan.keys):
        for shard in plan.destination_sharding.by_key[key].shards:
            held[tensor, [index[rank] for rank in shard.ranks]] += shard.box.volume
    if (written != held).any():
        tensor, column = np.argwhere(written != held)[0].tolist()
        raise PlanError(
            f"{plan.keys[tensor]} on rank {plan.destination_sharding.ranks[column]}: "
            f"{written[tensor, column]} of {held[tensor, column]} elements are written"
        )


def _row_text(plan: RefitPlan, row: int) -> str:
    transfer = next(plan.transfers(np.array([row])))
    return f"{transfer.tensor.key} at {transfer.box.offsets}+{transfer.box.extents}"
