"""The weights of an FP8 destination: codes and scales in memory of their own, and the model that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from refit.config.quantisation import CODES_DTYPE, Quantisation
from refit.encodings.fp8.reference import dequantise
from refit.memory.views import matrices_of, matrix_of, part_within
from refit.memory.weights import LocalShard, LocalWeights, assembled, new_shard
from refit.models.forward_pass import ForwardPass
from refit.models.sharded_model import LiveSettings, ShardedModel, Trainer
from refit.plan.box import Box
from refit.plan.quantised import Grid, scale_spec
from refit.plan.sharding import TensorSpec


class QuantisedModel:
    """A ShardedModel that holds codes and scales in place of the weights of `model` that `quantisation` names.

    The memory of those weights is given back. Passes take it again and fill it with codes x scales, rounded to the
    model's dtype.
    """

    trainer: Trainer | None = None

    def __init__(self, model: ShardedModel, quantisation: Quantisation) -> None:
        self._model = model
        self._block = quantisation.format
        weights = model.weights
        self._weights: LocalWeights | None = None
        self._replaced: list[LocalShard] = []
        self._released: list[torch.UntypedStorage] = []
        if weights is None:
            return
        kept: list[LocalShard] = []
        for shard in weights:
            quantised = quantisation.quantises(shard.tensor.key, shard.tensor.shape)
            (self._replaced if quantised else kept).append(shard)
        held = weights.rank_sharding.shards
        keys = dict.fromkeys(shard.tensor.key for shard in self._replaced)
        made = (part for key in keys for box in held[key].boxes for part in self._allocated(held[key].tensor, box))
        self._weights = LocalWeights((*kept, *made))
        storages = {shard.view.untyped_storage().data_ptr(): shard.view.untyped_storage() for shard in self._replaced}
        in_use = {shard.view.untyped_storage().data_ptr() for shard in kept}
        assert not storages.keys() & in_use, "quantised weights share memory with others"
        self._released = list(storages.values())
        self._sizes = [storage.nbytes() for storage in self._released]
        self._release()

    @property
    def weights(self) -> LocalWeights | None:
        return self._weights

    @property
    def settings(self) -> LiveSettings:
        return self._model.settings

    def check_forward(self) -> None:
        self._model.check_forward()

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        self.prepare_infer()
        found = self._model.forward(tokens, replayed)
        self._release()
        return found

    def prepare_infer(self) -> None:
        """Multiply codes by scales. The memory that this takes stays in use until `forward` has given logits."""
        if self._weights is None:
            return
        for storage, size in zip(self._released, self._sizes, strict=True):
            storage.resize_(size)
        with torch.no_grad():
            for shard in self._replaced:
                self._fill(self._weights, shard)

    def infer(self, tokens: torch.Tensor) -> None:
        self._model.infer(tokens)

    def _release(self) -> None:
        for storage in self._released:
            storage.resize_(0)

    def _allocated(self, tensor: TensorSpec, box: Box) -> Iterator[LocalShard]:
        """New codes and scales of `box`."""
        device, grid = self._replaced[0].view.device, Grid(tensor.shape, self._block)
        codes = TensorSpec(tensor.key, tensor.shape, CODES_DTYPE, stacked=tensor.stacked, padded=tensor.padded)
        for spec, part in ((codes, box), (scale_spec(tensor, grid), grid.scales(box))):
            yield new_shard(spec, part, device)

    def _fill(self, weights: LocalWeights, shard: LocalShard) -> None:
        grid = Grid(shard.tensor.shape, self._block)
        for part in matrices_of(shard.box):
            whole = grid.hull(part)
            codes = assembled(weights, shard.tensor.key, whole)
            scales = assembled(weights, scale_spec(shard.tensor, grid).key, grid.scales(whole))
            values = part_within(
                dequantise(matrix_of(codes), matrix_of(scales), self._block).view(codes.shape), whole, part
            )
            part_within(shard.view.detach(), shard.box, part).copy_(values)
