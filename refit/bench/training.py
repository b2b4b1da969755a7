"""Optimizer steps between refits: the source's trainer goes on, and what each step has changed is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from refit.bench.measurements.train_step import tokens_of
from refit.bench.session import Session
from refit.bench.sides import Side
from refit.memory.views import part_within
from refit.memory.weights import LocalShard, LocalWeights
from refit.plan.box import Box
from refit.predict.kinds import kind_of
from refit.results.delta import Changed

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SavedWeights:
    """A copy of all shards of a side on this rank, in the host's memory; empty on ranks outside the side."""

    def __init__(self, weights: LocalWeights | None) -> None:
        self._weights = weights
        self._copies = [shard.view.to("cpu", copy=True) for shard in self._shards()]

    def restore(self) -> None:
        """Write the copy back."""
        with torch.no_grad():
            for shard, copy in zip(self._shards(), self._copies, strict=True):
                shard.view.copy_(copy)

    def differences(self) -> Iterator[tuple[LocalShard, torch.Tensor, torch.Tensor]]:
        """Of each shard the copy, where the shard is, and which elements of it are others now, compared as bits: bool.

        All in the shape of the shard's view.
        """
        for shard, copy in zip(self._shards(), self._copies, strict=True):
            kept = copy.to(shard.view.device)
            bits = _BITS[kept.element_size()]
            yield shard, kept, shard.view.view(bits) != kept.view(bits)

    def _shards(self) -> Iterator[LocalShard]:
        """As they are now: a model may have given its weights new storage."""
        if self._weights is not None:
            self._weights.refresh()
            yield from self._weights


class Training:
    """The source between refits, after the train-step measurement. `saved` is what the last step has left."""

    def __init__(self, session: Session, source: Side) -> None:
        steps, model = session.scenario.steps, session.scenario.model
        assert steps is not None
        assert model is not None
        self._steps, self._vocab_size, self._source = steps, model.vocab_size, source
        self._number = steps.num_warmup + steps.num_steps  # the last one was that of the breakdown
        self._own = _own_boxes(source, session.rank)
        self.saved = SavedWeights(source.weights)

    def step(self) -> dict[str, Changed]:
        """Take one optimizer step from the weights that the last one has left. Returns what it changed, by kind of
        tensor; each element is counted on the first rank that holds it.

        Collective: every rank of the source.
        """
        self._number += 1
        trainer = self._source.model.trainer
        if trainer is not None:
            with torch.enable_grad():
                trainer.step(tokens_of(self._steps, self._number, self._vocab_size))
        found = self._changed()
        self.saved = SavedWeights(self._source.weights)
        return found

    def _changed(self) -> dict[str, Changed]:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for shard, _, differs in self.saved.differences():
            for own in self._own.get(shard.tensor.key, ()):
                box = own.intersect(shard.box)
                if box is not None:
                    count = counts[kind_of(shard.tensor.key)]
                    count[0] += box.volume
                    count[1] += int(part_within(differs, shard.box, box).sum())
        return {kind: Changed(*count) for kind, count in counts.items()}


def _own_boxes(source: Side, rank: int) -> Mapping[str, list[Box]]:
    """The boxes of each tensor of which `rank` is the first holder."""
    return {
        key: [shard.box for shard in tensor.shards if shard.ranks[0] == rank]
        for key, tensor in source.sharding.by_key.items()
    }
