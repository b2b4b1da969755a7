"""The pure part of a delta: the tensors as they are, in messages of another length. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refit.config.delta import DeltaOptions, Snapshot
from refit.config.side import SideSpec
from refit.encodings.delta.form import CPU_BLOCK, expected_bytes, max_bytes
from refit.encodings.delta.passing import packed_bytes
from refit.plan.plan import RefitPlan
from refit.plan.sharding import Sharding
from refit.plan.wire import Forecast, Wire

SAMPLE = 64 * CPU_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaWire(Wire):
    """What a refit that sends changes moves. A source keeps a snapshot of all that it sends to other ranks."""

    options: DeltaOptions
    work: str = "snapshot"

    def memory_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """The snapshots, where they are on the device."""
        return {} if self.options.snapshot is Snapshot.HOST else snapshot_bytes(plan)

    def forecasts(self, plan: RefitPlan) -> list[Forecast]:
        """What goes within a rank is copied whole. A source reads old and new of all that it sends."""
        sizes = np.array([min(each.itemsize, 4) for each in plan.classes], np.int64)[plan.tensor_class]
        work = {rank: 2 * nbytes for rank, nbytes in snapshot_bytes(plan).items()}
        found = []
        for share in self.options.shares:
            part = {size: expected_bytes(SAMPLE, size, share) / (SAMPLE * size) for size in set(sizes.tolist())}
            nbytes = np.rint(plan.nbytes * np.array([part[size] for size in sizes.tolist()])).astype(np.int64)
            found.append(Forecast(share, np.where(plan.is_wire, nbytes, plan.nbytes), work))
        return found


def snapshot_bytes(plan: RefitPlan) -> dict[int, int]:
    """What each rank packs for others: a snapshot of it takes as much. What it passes on as it arrived needs none."""
    return {rank: int(nbytes) for rank, nbytes in enumerate(packed_bytes(plan)) if nbytes}


def wire_of(source: Sharding, destination: Sharding, side: SideSpec, options: DeltaOptions) -> DeltaWire:
    """The shardings of both sides as they are."""
    return DeltaWire(source=source, destination=destination, max_bytes=max_bytes, options=options)
