"""Two small encodings, as a developer would write them in one file: of all rows, only some are sent.

A row is the last dim of a tensor. A message has, for each piece, a byte per row, 1 where the row follows, and then
these rows. `rows` sends those that differ from zero. So that there are such rows, its part of the oracle fills about
half of them with zeros, others in each refit. `changes` sends those that differ from what was sent before, so that the
destination must still have the others: its part of the oracle changes half of the rows in each refit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refit.config.rows import Encoding
from refit.config.scenario import Scenario
from refit.config.side import SideSpec
from refit.encodings.base import Peers
from refit.encodings.oracle import OraclePart, WrappedPart
from refit.encodings.packed import PackedWeights
from refit.encodings.values import hash_bits
from refit.errors import RefitError
from refit.memory.codec import Piece
from refit.memory.rows import Rows
from refit.memory.views import part_within
from refit.memory.weights import LocalWeights, Part, assembled
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
            kept = self._chosen((tensor.key, box), rows)
            for part in (kept.to(torch.uint8), rows[kept].view(-1)):
                payload[end : end + len(part)] = part
                end += len(part)
        length.fill_(end)

    def _chosen(self, part: Part, rows: torch.Tensor) -> torch.Tensor:
        """Whether each of the rows, `[rows, bytes]`, is sent."""
        return (rows != 0).any(dim=1)


class ChangeEncoder(RowEncoder):
    """The first time, and after weights have moved, everything is sent."""

    def __init__(self, weights: LocalWeights, pieces: Sequence[Piece]) -> None:
        super().__init__(weights, pieces)
        self._sent: dict[Part, torch.Tensor] = {}

    def _chosen(self, part: Part, rows: torch.Tensor) -> torch.Tensor:
        before = self._sent.get(part)
        self._sent[part] = rows.clone()
        return torch.ones(len(rows), dtype=torch.bool) if before is None else (rows != before).any(dim=1)


class RowDecoder:
    def __init__(self, weights: LocalWeights, pieces: Sequence[Piece]) -> None:
        self._weights, self._pieces = weights, pieces

    def unpack(self, payload: torch.Tensor, length: torch.Tensor) -> None:
        message, end = payload[: int(length)], 0
        for tensor, box in self._pieces:
            kept = message[end : end + num_rows(box)].bool()
            end += num_rows(box)
            rows = self._base(tensor, box)
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

    def _base(self, tensor: TensorSpec, box: Box) -> torch.Tensor:
        """`[rows, bytes]`: what rows are that were not sent."""
        return torch.zeros(num_rows(box), box.volume * tensor.itemsize // num_rows(box), dtype=torch.uint8)


class ChangeDecoder(RowDecoder):
    def _base(self, tensor: TensorSpec, box: Box) -> torch.Tensor:
        held = assembled(self._weights, tensor.key, box).clone(memory_format=torch.contiguous_format)
        return held.view(-1).view(torch.uint8).view(num_rows(box), -1)


def packed(weights: LocalWeights | None) -> PackedWeights | None:
    return None if weights is None else PackedWeights(weights, RowEncoder, RowDecoder)


class LiveRows:
    """The rows are found and sent message by message, so that nothing is left to do around a run."""

    phases = ()
    staging_bytes = 0
    remark = None

    def __init__(
        self, plan: RefitPlan, wire: Wire, peers: Peers, source: LocalWeights | None, destination: LocalWeights | None
    ) -> None:
        self.source, self.destination = packed(source), packed(destination)

    def prepared(self) -> None: ...
    def begin(self) -> None: ...
    def finish(self) -> None: ...
    def beside_s(self, finish_s: float) -> dict[str, float]:
        return {}

    def counted(self) -> dict[str, int]:
        return {}

    def forget(self, reason: str) -> None: ...

    def close(self) -> None:
        self.source = self.destination = None


class RowsPart(WrappedPart):
    """About half of the rows are zeros."""

    def __init__(self, inner: OraclePart, scenario: Scenario | None = None) -> None:
        super().__init__(inner)

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        first = Rows(block.row_numbers, 0, block.data[:, :1])
        is_zero = hash_bits(tensor.key + " row", iteration, first) < 0
        return self.inner.values(tensor, block, iteration).masked_fill_(is_zero, 0)


class LiveChanges(LiveRows):
    def __init__(
        self, plan: RefitPlan, wire: Wire, peers: Peers, source: LocalWeights | None, destination: LocalWeights | None
    ) -> None:
        self.source, self.destination = (
            None if weights is None else PackedWeights(weights, ChangeEncoder, ChangeDecoder)
            for weights in (source, destination)
        )


class ChangesPart(RowsPart):
    """In even refits the rows with one hash change, in odd ones the others."""

    keeps_base = True

    def values(self, tensor: TensorSpec, block: Rows, iteration: int) -> torch.Tensor:
        now, before = (self.inner.values(tensor, block, each) for each in (iteration, max(iteration - 1, 0)))
        is_even = hash_bits(tensor.key + " row", 0, Rows(block.row_numbers, 0, block.data[:, :1])) < 0
        return torch.where(is_even if iteration % 2 == 0 else ~is_even, now, before)


CHANGES = Encoding(
    title="the rows that have changed",
    wire=f"{HERE}:wire",
    bind=f"{HERE}:LiveChanges",
    oracle=f"{HERE}:ChangesPart",
)

ROWS = Encoding(
    title="the rows that differ from zero",
    wire=f"{HERE}:wire",
    bind=f"{HERE}:LiveRows",
    oracle=f"{HERE}:RowsPart",
)
