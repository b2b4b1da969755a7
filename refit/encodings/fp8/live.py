"""The live part of FP8: what lies whole at the source is quantised before it is sent, the rest where it has arrived.

Any transport moves codes and scales, as tensors of the wire's shardings (`encodings.fp8.wire`). It asks the weights
that it is given what to do before it reads them and after it has written them, so both happen beside the transfer
(`encodings.fp8.pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from refit.config.quantisation import scale_key
from refit.encodings.base import Peers
from refit.encodings.fp8.batch import load_quantise_kernel
from refit.encodings.fp8.groups import Gather, Groups, Job
from refit.encodings.fp8.made import Made, MadeWeights, Places
from refit.encodings.fp8.matrix import Matrix
from refit.encodings.fp8.pipeline import OnArrival, OnDemand, PipelinedWeights
from refit.encodings.fp8.wire import QuantisedWire, unquantised
from refit.memory.views import matrices_of, matrix_of, part_within
from refit.memory.weights import LocalShard, LocalWeights, Part, new_shard
from refit.plan.plan import RefitPlan
from refit.plan.quantised import Grid
from refit.plan.sharding import TensorSpec

AT_SOURCE, AT_DESTINATION = "quantise", "quantise arrived"
"""Phases of a run, beside the transport's."""


class LiveFp8:
    """The `LiveEncoding` of one rank."""

    phases = (AT_SOURCE, AT_DESTINATION)
    remark = None

    def __init__(
        self,
        plan: RefitPlan,
        wire: QuantisedWire,
        peers: Peers,
        source: LocalWeights | None,
        destination: LocalWeights | None,
    ) -> None:
        """`plan` is the plan of what crosses the wire."""
        rank = peers.rank
        quantisation = self._quantisation = wire.quantisation
        self._tensors = wire.tensors
        held = source if source is not None else destination
        self._device = torch.device("cpu") if held is None else held.device
        part = plan.for_rank(rank)
        self._made: MadeWeights | None = None
        self._sends = bool(part.sends)
        at_source, at_destination = (Groups(name, self._device, quantisation) for name in self.phases)
        self._demand = OnDemand(at_source, self._sent_weights(), self._source_jobs)
        self._arrival = OnArrival(at_destination, self._arrived_weights(), self._destination_jobs)
        self._pipelines = (self._demand, self._arrival)
        self.source: LocalWeights | None = None
        self.destination: LocalWeights | None = None
        if source is not None:
            places = Places(self._tensors, quantisation.format, source, destination, rank, part)
            self.source = self._made = MadeWeights(self._sent_shards(source), places, self._demand)
        if destination is not None:
            self.destination = PipelinedWeights((*destination, *self._new_arrivals(wire, rank)), self._arrival)
        if self._device.type == "cuda":
            load_quantise_kernel(self._device, quantisation)

    @property
    def staging_bytes(self) -> int:
        """Codes and scales that a source makes for others, and weights that wait to be quantised."""
        shadows = () if self._made is None else self._made.shadows
        own = [*self._arrivals(), *(shard for shadow in shadows for shard in (shadow.codes, shadow.scales))]
        gathered = (job.gather.whole for job in self._demand.jobs if job.gather is not None)
        nbytes: int = sum(view.numel() * view.element_size() for view in (*(shard.view for shard in own), *gathered))
        return nbytes

    def prepared(self) -> None:
        """Make the groups, now that the transport has said what it copies."""
        self.begin()

    def begin(self) -> None:
        for pipeline in self._pipelines:
            pipeline.begin()

    def finish(self) -> None:
        """Raises RefitError where weights have NaN or infinity."""
        for pipeline in self._pipelines:
            pipeline.groups.finish()

    def beside_s(self, finish_s: float) -> Mapping[str, float]:
        """Of a GPU's quantising, what ran beside the transfer: neither for its first message nor after its last.

        A source that sends nothing has its transfer in the quantising itself.
        """
        sent, arrived = self._demand.groups, self._arrival.groups
        at_source = sent.busy_s - sent.first_s if self._sends else 0.0
        beside = {AT_SOURCE: at_source, AT_DESTINATION: arrived.busy_s - finish_s}
        return {phase: seconds for phase, seconds in beside.items() if seconds > 0.0}

    def counted(self) -> Mapping[str, int]:
        return {}

    def forget(self, reason: str) -> None:
        """No refit builds on another."""

    def close(self) -> None:
        self._made, self.source, self.destination = None, None, None
        for pipeline in self._pipelines:
            pipeline.close()

    def _sent_weights(self) -> Callable[[Part], Part | None]:
        """Of a part that is sent, the weights that it is made of: those of codes, or of scales."""
        of_scales = {scale_key(key): key for key in self._tensors}

        def weights(part: Part) -> Part | None:
            key, box = part
            if key in of_scales:
                return of_scales[key], self._grid(self._tensors[of_scales[key]]).elements(box)
            return part if key in self._tensors else None

        return weights

    def _arrived_weights(self) -> Callable[[Part], Part | None]:
        """Of a part that has arrived, the weights to quantise."""
        keys = {unquantised(tensor).key: key for key, tensor in self._tensors.items()}
        return lambda part: (keys[part[0]], part[1]) if part[0] in keys else None

    def _grid(self, tensor: TensorSpec) -> Grid:
        return Grid(tensor.shape, self._quantisation.format)

    def _new_arrivals(self, wire: QuantisedWire, rank: int) -> Iterator[LocalShard]:
        """Memory for the weights that this rank receives unquantised."""
        held = wire.destination.of_rank(rank).shards
        for tensor in self._tensors.values():
            shard = held.get(unquantised(tensor).key)
            if shard is not None:
                yield from (new_shard(shard.tensor, box, self._device) for box in shard.boxes)

    def _arrivals(self) -> Iterator[LocalShard]:
        """The weights that this rank receives unquantised."""
        keys = {unquantised(tensor).key for tensor in self._tensors.values()}
        return (shard for shard in self.destination or () if shard.tensor.key in keys)

    def _sent_shards(self, source: LocalWeights) -> Iterator[LocalShard]:
        """The source's weights under the keys that they are sent under."""
        for shard in source:
            quantised = shard.tensor.key in self._tensors
            yield replace(shard, tensor=unquantised(shard.tensor)) if quantised else shard

    def _source_jobs(self) -> Iterator[Job]:
        if self._made is not None:
            for made in self._made.made:
                yield from self._jobs_of(made, self._made)

    def _jobs_of(self, made: Made, held: LocalWeights) -> Iterator[Job]:
        key, grid = made.tensor.key, self._grid(made.tensor)
        for part in matrices_of(made.box):
            views = held.views(unquantised(made.tensor).key, part)
            gather = None
            if all(grid.is_aligned(view.box) for view in views):
                pieces = [(view.box, view.data) for view in views]
            else:
                whole = torch.empty(part.extents, dtype=views[0].data.dtype, device=self._device)
                parts = tuple(part_within(whole, part, view.box) for view in views)
                gather = Gather(whole, parts, tuple(view.data for view in views))
                pieces = [(part, whole)]
            for box, data in pieces:
                (codes,) = held.views(key, box)  # where they are now: a destination's storage may be new
                (scales,) = held.views(scale_key(key), grid.scales(box))
                matrix = Matrix(key, matrix_of(data), matrix_of(codes.data), matrix_of(scales.data))
                yield Job(box, matrix, gather)

    def _destination_jobs(self) -> Iterator[Job]:
        keys = {unquantised(tensor).key: tensor for tensor in self._tensors.values()}
        for arrival in self._arrivals():
            assert self.destination is not None
            tensor = keys[arrival.tensor.key]
            grid = self._grid(tensor)
            for part in matrices_of(arrival.box):
                for codes in self.destination.views(tensor.key, part):  # several where an engine has fused tensors
                    (scales,) = self.destination.views(scale_key(tensor.key), grid.scales(codes.box))
                    weights = part_within(arrival.view, arrival.box, codes.box)
                    matrix = Matrix(tensor.key, matrix_of(weights), matrix_of(codes.data), matrix_of(scales.data))
                    yield Job(codes.box, matrix)
