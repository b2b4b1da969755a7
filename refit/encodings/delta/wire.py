"""The pure part of a delta: the tensors as they are, in messages of another length. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refit.config.delta import DeltaOptions, Snapshot
from refit.config.side import SideSpec
from refit.encodings.delta.form import max_bytes
from refit.plan.plan import RefitPlan
from refit.plan.sharding import Sharding
from refit.plan.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaWire(Wire):
    """What a refit that sends changes moves. A source keeps a snapshot of all that it sends to other ranks."""

    options: DeltaOptions
    work: str = "snapshot"

    def memory_bytes(self, plan: RefitPlan) -> Mapping[int, int]:
        """The snapshots, where they are on the device."""
        return {} if self.options.snapshot is Snapshot.HOST else snapshot_bytes(plan)


def snapshot_bytes(plan: RefitPlan) -> dict[int, int]:
    """What each source rank sends to others: a snapshot of it takes as much."""
    needed = np.zeros(1 + plan.ranks[-1], np.int64)
    sent = plan.source != plan.destination
    np.add.at(needed, plan.source[sent], plan.nbytes[sent])
    return {rank: int(nbytes) for rank, nbytes in enumerate(needed) if nbytes}


def wire_of(source: Sharding, destination: Sharding, side: SideSpec, options: DeltaOptions) -> DeltaWire:
    """The shardings of both sides as they are."""
    return DeltaWire(source=source, destination=destination, max_bytes=max_bytes, options=options)
