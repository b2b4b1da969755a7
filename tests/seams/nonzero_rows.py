"""A small encoding, as a developer would write it in one file: only the rows that differ from zero are sent.

A row is the last dim of a tensor. A message has, for each piece, a byte per row, 1 where the row follows, and then
these rows. So that there are such rows, the oracle's part fills about half of them with zeros, others in each refit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from refit.config.registry import Encoding
from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.encodings.oracle import Comparison, OraclePart, Values
from refit.encodings.packed import PackedWeights
from refit.encodings.values import hash_bits
from refit.errors import RefitError
from refit.memory.codec import Piece
from refit.memory.rows import Rows
from refit.memory.views import part_within
from refit.memory.weights import LocalShard, LocalWeights, assembled
from refit.plan.box import Box
from refit.plan.plan import RefitPlan
from refit.plan.sharding import Sharding, TensorSpec
from refit.plan.wire import Wire

HERE = "tests.seams.nonzero_rows"


def num_rows(box: Box) -> int:
    return box.volume // box.extents[-1] if box.extents else 1


def max_bytes(tensor: TensorSpec, box: Box) -> int:
    return num_rows(box) + box.volume * tensor.itemsize


def wire(source: Sharding, destination: Sharding, side: SideSpec) -> Wire:
    """The tensors as they are, in messages of another length."""
    return Wire(source=source, destination=destination, max_bytes=max_bytes)


class RowEncoder:
    def __init__(self, weights: LocalWeights, pieces: Sequence[Piece]) -> None:
        self._weights, self._pieces = weights, pieces

    def pack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        end = 0
        for tensor, box in self._pieces:
            data = assembled(self._weights, tensor.key, box).to(getattr(torch, tensor.dtype))
            rows = data.contiguous().view(-1).view(torch.uint8).view(num_rows(box), -1)
            kept = (rows != 0).any(dim=1)
            for part in (kept.to(torch.uint8), rows[kept].view(-1)):
                payload[end : end + len(part)] = part
                end += len(part)
        length.fill_(end)


class RowDecoder:
    def __init__(self, weights: LocalWeights, pieces: Sequence[Piece]) -> None:
        self._weights, self._pieces = weights, pieces

    def unpack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        message, end = payload[: int(length)], 0
        for tensor, box in self._pieces:
            kept = message[end : end + num_rows(box)].bool()
            end += num_rows(box)
            rows = torch.zeros(num_rows(box), box.volume * tensor.itemsize // num_rows(box), dtype=torch.uint8)
            nbytes = int(kept.sum()) * rows.shape[1]
            if end + nbytes > len(message):
                raise RefitError(f"it ends after {len(message)} bytes, its rows go on to {end + nbytes}")
            rows[kept] = message[end : end + nbytes].view(-1, rows.shape[1])
            end += nbytes
            whole = rows.view(-1).view(getattr(torch, tensor.dtype)).view(box.extents)
            for view in self._weights.views(tensor.key, box):
                view.data.copy_(part_within(whole, box, view.box))
        if end != len(message):
            raise RefitError(f"it has {len(message)} bytes, its rows end after {end}")


def packed(weights: LocalWeights | None) -> PackedWeights | None:
    return None if weights is None else PackedWeights(weights, RowEncoder, RowDecoder)


class LiveRows:
    """The rows are found and sent message by message, so that nothing is left to do around a run."""

    phases = ()
    staging_bytes = 0

    def __init__(
        self, plan: RefitPlan, wire: Wire, rank: int, source: LocalWeights | None, destination: LocalWeights | None
    ) -> None:
        self.source, self.destination = packed(source), packed(destination)

    def prepared(self) -> None: ...
    def begin(self) -> None: ...
    def finish(self) -> None: ...
    def beside_s(self, finish_s: float) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.source = self.destination = None


class RowsPart:
    """About half of the rows are zeros."""

    def __init__(self, inner: OraclePart, scenario: Scenario | None = None) -> None:
        self._inner = inner

    keeps_base = False

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        first = Rows(block.row_numbers, 0, block.data[:, :1])
        is_zero = hash_bits(tensor.key + " row", iteration, first) < 0
        return self._inner.values(tensor, block, iteration).masked_fill_(is_zero, 0)

    def comparisons(
        self,
        values: Values,
        held: LocalWeights,
        shard: LocalShard,
        source: Mapping[str, TensorSpec],
        start: int | None = None,
    ) -> Iterator[Comparison]:
        return self._inner.comparisons(values, held, shard, source, start)


ROWS = Encoding(
    title="the rows that differ from zero",
    wire=f"{HERE}:wire",
    bind=f"{HERE}:LiveRows",
    oracle=f"{HERE}:RowsPart",
)
