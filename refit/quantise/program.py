"""A refit that quantises: before the transfer what lies whole at the source, after it what arrived unquantised.

Between the two any transport moves codes and scales, as tensors of the wire's shardings (`plan.quantised`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from refit.config.quantisation import CODES_DTYPE, Quantisation, scale_key
from refit.models.weights import LocalShard, LocalWeights, generations, part_within, refresh_all
from refit.plan.box import Box
from refit.plan.plan import RefitPlan, Transfer
from refit.plan.quantised import Grid, WireShardings, scale_spec, unquantised
from refit.plan.sharding import TensorSpec
from refit.quantise.batch import QuantiseBatch
from refit.quantise.matrix import Matrix
from refit.quantise.weights import matrices_of, matrix_of, new_shard
from refit.transport.base import Program, RunReport
from refit.transport.phases import PhaseClock

AT_SOURCE, AT_DESTINATION = "quantise", "quantise arrived"
"""Phases of a run, beside the transport's."""

Prepare = Callable[[LocalWeights | None, LocalWeights | None], Program]
"""Prepares the transfer of a source's weights to a destination's."""


@dataclass(frozen=True, slots=True)
class _Shadow:
    """Codes and scales, at a source, of `box` of `tensor`."""

    tensor: TensorSpec
    box: Box
    codes: LocalShard
    scales: LocalShard


@dataclass(frozen=True, slots=True)
class _Gather:
    """Weights of several views whose seams cut blocks, to be copied together before they are quantised."""

    whole: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    views: tuple[torch.Tensor, ...]


class QuantisingProgram:
    """The `Program` of one rank. `prepare` is called with the weights that the wire sees."""

    def __init__(
        self,
        plan: RefitPlan,
        wire: WireShardings,
        quantisation: Quantisation,
        rank: int,
        source: LocalWeights | None,
        destination: LocalWeights | None,
        prepare: Prepare,
    ) -> None:
        """`plan` is the plan of `wire`. Collective, as `prepare` is."""
        self._quantisation = quantisation
        self._tensors = wire.tensors
        self._source, self._destination = source, destination
        held = source if source is not None else destination
        self._device = torch.device("cpu") if held is None else held.device
        part = plan.for_rank(rank)
        self._shadows = [] if source is None else list(self._new_shadows(source, (*part.sends, *part.local)))
        self._arrivals = [] if destination is None else list(self._new_arrivals(wire, rank))
        self._gathers: list[_Gather] = []
        self._bind()
        self._program = prepare(
            None if source is None else LocalWeights(self._sent(source)),
            None if destination is None else LocalWeights((*destination, *self._arrivals)),
        )

    @property
    def staging_bytes(self) -> int:
        """The transport's staging, codes and scales at a source, and weights that wait to be quantised."""
        own = [*self._arrivals, *(shard for shadow in self._shadows for shard in (shadow.codes, shadow.scales))]
        views = [*(shard.view for shard in own), *(gather.whole for gather in self._gathers)]
        nbytes: int = sum(view.numel() * view.element_size() for view in views)
        return self._program.staging_bytes + nbytes

    def run(self) -> RunReport:
        """Quantise, transfer, quantise. Raises RefitError where weights have NaN or infinity, and as transports do."""
        with torch.no_grad():
            clock = PhaseClock()
            refresh_all(self._source, self._destination)
            if self._bound_to != generations(self._source, self._destination):
                self._bind()
            for gather in self._gathers:
                torch._foreach_copy_(gather.parts, gather.views)
            self._at_source.run()
            # Transports read on streams of their own, which do not wait for this one.
            self._synchronise()
            clock.lap(AT_SOURCE)
            report = self._program.run()
            clock.lap("transfer")
            self._at_destination.run()
            self._synchronise()
            self._at_source.check_finite()
            self._at_destination.check_finite()
            clock.lap(AT_DESTINATION)
        phases = {AT_SOURCE: clock.phases_s[AT_SOURCE], **report.phases_s}
        return replace(report, phases_s={**phases, AT_DESTINATION: clock.phases_s[AT_DESTINATION]})

    def close(self) -> None:
        self._program.close()
        self._shadows, self._arrivals, self._gathers = [], [], []
        self._at_source = self._at_destination = QuantiseBatch((), self._quantisation)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _bind(self) -> None:
        """Find the views to quantise from and into."""
        self._bound_to = generations(self._source, self._destination)
        self._gathers = []
        self._at_source = QuantiseBatch(
            [matrix for shadow in self._shadows for matrix in self._matrices_of(shadow)], self._quantisation
        )
        self._at_destination = QuantiseBatch(list(self._arrived_matrices()), self._quantisation)

    def _grid(self, tensor: TensorSpec) -> Grid:
        return Grid(tensor.shape, self._quantisation.format)

    def _new_shadows(self, source: LocalWeights, transfers: Iterable[Transfer]) -> Iterator[_Shadow]:
        """Memory for the codes and scales that this rank sends: per box it holds, the box of blocks around them."""
        held = source.rank_sharding.shards
        of_scales = {scale_key(key): key for key in self._tensors}
        boxes: dict[tuple[str, Box], Box] = {}
        for transfer in transfers:
            key = of_scales.get(transfer.tensor.key, transfer.tensor.key)
            if key not in self._tensors:
                continue
            grid = self._grid(self._tensors[key])
            box = transfer.box if key == transfer.tensor.key else grid.elements(transfer.box)
            outer = next(each for each in held[key].boxes if each.contains(box))
            known = boxes.get((key, outer))
            boxes[key, outer] = grid.hull(box) if known is None else _around(known, grid.hull(box))
        for (key, _), box in boxes.items():
            tensor = self._tensors[key]
            grid = self._grid(tensor)
            codes = new_shard(replace(tensor, dtype=CODES_DTYPE), box, source.device)
            scales = new_shard(scale_spec(tensor, grid), grid.scales(box), source.device)
            yield _Shadow(tensor, box, codes, scales)

    def _new_arrivals(self, wire: WireShardings, rank: int) -> Iterator[LocalShard]:
        """Memory for the weights that this rank receives unquantised."""
        held = wire.destination.of_rank(rank).shards
        for tensor in self._tensors.values():
            shard = held.get(unquantised(tensor).key)
            if shard is not None:
                yield from (new_shard(shard.tensor, box, self._device) for box in shard.boxes)

    def _sent(self, source: LocalWeights) -> Iterator[LocalShard]:
        """The source as the wire sees it: codes and scales, and weights under the keys that they are sent under."""
        for shard in source:
            quantised = shard.tensor.key in self._tensors
            yield replace(shard, tensor=unquantised(shard.tensor)) if quantised else shard
        for shadow in self._shadows:
            yield from (shadow.codes, shadow.scales)

    def _matrices_of(self, shadow: _Shadow) -> Iterator[Matrix]:
        assert self._source is not None
        grid = self._grid(shadow.tensor)
        for part in matrices_of(shadow.box):
            views = self._source.views(shadow.tensor.key, part)
            if all(grid.is_aligned(view.box) for view in views):
                pieces = [(view.box, view.data) for view in views]
            else:
                whole = torch.empty(part.extents, dtype=views[0].data.dtype, device=self._device)
                parts = tuple(part_within(whole, part, view.box) for view in views)
                self._gathers.append(_Gather(whole, parts, tuple(view.data for view in views)))
                pieces = [(part, whole)]
            for box, data in pieces:
                codes = part_within(shadow.codes.view, shadow.box, box)
                scales = part_within(shadow.scales.view, shadow.scales.box, grid.scales(box))
                yield Matrix(shadow.tensor.key, matrix_of(data), matrix_of(codes), matrix_of(scales))

    def _arrived_matrices(self) -> Iterator[Matrix]:
        keys = {unquantised(tensor).key: tensor for tensor in self._tensors.values()}
        for arrival in self._arrivals:
            assert self._destination is not None
            tensor = keys[arrival.tensor.key]
            grid = self._grid(tensor)
            for part in matrices_of(arrival.box):
                for codes in self._destination.views(tensor.key, part):  # several where an engine has fused tensors
                    (scales,) = self._destination.views(scale_key(tensor.key), grid.scales(codes.box))
                    weights = part_within(arrival.view, arrival.box, codes.box)
                    yield Matrix(tensor.key, matrix_of(weights), matrix_of(codes.data), matrix_of(scales.data))


def _around(one: Box, other: Box) -> Box:
    """The smallest box around two."""
    offsets = tuple(map(min, one.offsets, other.offsets))
    ends = map(max, one.ends, other.ends)
    return Box(offsets, tuple(end - offset for end, offset in zip(ends, offsets, strict=True)))
