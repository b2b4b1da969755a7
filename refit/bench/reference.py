"""A full refit of the same weights into the same memory: what a refit of trained weights must have delivered.

Trained weights are no function of their place, as the oracle's are. So what a refit that sends changes has left is
kept, the destination is poisoned, everything is sent without that encoding, and both are compared as bits, whatever the
destination's dtype. The program that sends everything is the one of the engine `full`, which the oracle checks.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from refit.bench import oracle
from refit.bench.engines.base import RefitEngine
from refit.bench.sides import Side
from refit.bench.training import SavedWeights
from refit.memory.weights import LocalShard
from refit.predict.sides import PlannedSides
from refit.transport.base import Program
from refit.transport.ranks import Ranks


class Reference:
    """Full refits from `source` to `destination` with `engine`, which is connected here. Collective, as all of it."""

    def __init__(
        self, engine: RefitEngine, planned: PlannedSides, ranks: Ranks, source: Side, destination: Side
    ) -> None:
        engine.connect(planned, ranks)
        self._program: Program = engine.prepare(planned, source, destination)
        self._weights = destination.weights

    def check(self, not_moved: Container[str]) -> oracle.Verdict:
        """Compare what the destination holds with what a full refit delivers. It holds the latter afterwards."""
        found = SavedWeights(self._weights)
        if self._weights is not None:
            oracle.poison(self._weights)
        self._program.run()
        num_compared, wrong = 0, dict[str, oracle.WrongTensor]()
        for shard, kept, differs in found.differences():
            key = shard.tensor.key
            if key in not_moved:
                continue
            num_compared += differs.numel()
            count = int(differs.sum())
            if count:
                before = wrong.get(key)
                first = before.first if before else _first(shard, kept, differs)
                wrong[key] = oracle.WrongTensor(key, count + (before.num_wrong if before else 0), first)
        return oracle.Verdict(num_compared, tuple(wrong.values()))

    def close(self) -> None:
        self._program.close()


def _first(shard: LocalShard, found: torch.Tensor, differs: torch.Tensor) -> oracle.Mismatch:
    place = tuple(int(i) for i in differs.nonzero()[0])
    index = tuple(offset + i for offset, i in zip(shard.box.offsets, place, strict=True))
    return oracle.Mismatch(index, float(shard.view[place]), float(found[place]))
