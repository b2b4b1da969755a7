"""A side of vLLM's engines: this rank's parameters under vLLM's names, as its fused tensors hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from refit.config.scenario import Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import RefitError
from refit.memory.views import in_order
from refit.memory.weights import LocalShard, LocalWeights, joined
from refit.models.forward_pass import ForwardPass, Trace
from refit.models.sharded_model import WithoutSteps
from refit.models.vllm.dequantised import Dequantised, InFloat32
from refit.models.vllm.forward import ReferenceForward
from refit.models.vllm.groups import Groups, build_groups
from refit.plan.sharding import TensorSpec
from refit.predict.vllm.parameters import Engines, Parameter, RankBlock
from refit.predict.vllm.quantised import held_blocks, held_tensors


@dataclass(frozen=True, slots=True)
class RankModel:
    """This rank's part of an engine: its blocks, its parameters by full name, and what tells where it is."""

    shape: ModelShape
    engines: Engines
    groups: Groups
    blocks: tuple[RankBlock, ...]
    parameters: Mapping[str, torch.Tensor]


class VllmSide(WithoutSteps):
    """The `ShardedModel` of an engine. `model` is None on ranks outside the side."""

    def __init__(self, model: RankModel | None) -> None:
        self.model = model
        self.weights = weights_of(model.engines, model.blocks, model.parameters) if model is not None else None

    def check_forward(self) -> None:
        """The reference forward pass runs every model of the families, in any layout."""

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        """All ranks with the same dense weights get the same tokens."""
        model = self.model
        if model is None:
            return ForwardPass()
        parameters, quantisation = model.parameters, model.engines.quantisation
        if quantisation is not None:
            parameters = Dequantised(parameters, quantisation)
        reference = ReferenceForward(model.shape, model.engines, model.groups, InFloat32(parameters), Trace(replayed))
        try:
            with torch.no_grad():
                return reference.run(tokens)
        except (RuntimeError, KeyError, ValueError) as error:
            raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error


def build_side(scenario: Scenario, name: str, side: SideSpec, device: torch.device) -> VllmSide:
    """Allocate this rank's parameters. Collective: every rank of the job."""
    assert scenario.model is not None, "a model provider builds Megatron models only"
    engines = Engines(scenario.model, side)
    groups = build_groups(engines.engine, side.ranks)
    if groups is None:
        return VllmSide(None)
    blocks = tuple(held_blocks(engines, groups.place))
    parameters = {name: _empty(parameter, device) for name, parameter in _named(blocks)}
    return VllmSide(RankModel(scenario.model, engines, groups, blocks, parameters))


def rearranged(side: VllmSide, scenario: Scenario, spec: SideSpec) -> VllmSide:
    """The same memory, its experts' slots holding other experts: those that `spec` places there."""
    if side.model is None:
        return VllmSide(None)
    before = side.model
    engines = Engines(before.shape, spec)
    blocks = tuple(held_blocks(engines, before.groups.place))
    return VllmSide(RankModel(before.shape, engines, before.groups, blocks, before.parameters))


def weights_of(engines: Engines, blocks: Sequence[RankBlock], parameters: Mapping[str, torch.Tensor]) -> LocalWeights:
    """Every parameter of a rank's blocks, by its full name, as shards of logical tensors, views of its memory."""
    logical = held_tensors(engines)
    shards = [
        shard
        for block in blocks
        for parameter in block.parameters
        for shard in _shards(parameter, block, parameters, logical)
    ]
    return LocalWeights(joined(shards))


def _shards(
    parameter: Parameter,
    block: RankBlock,
    parameters: Mapping[str, torch.Tensor],
    logical: Mapping[str, TensorSpec],
) -> Iterator[LocalShard]:
    owner = parameters[block.block.prefix + parameter.name]
    data = owner.detach().view(parameter.shape)
    for piece in parameter.pieces:
        begin, end = piece.held.offsets, piece.held.ends
        view = data[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
        spec = logical[block.block.key_prefix + piece.key]
        yield LocalShard(spec, piece.box, owner, in_order(view, piece.axes).view(piece.box.extents))


def _named(blocks: Sequence[RankBlock]) -> Iterator[tuple[str, Parameter]]:
    for block in blocks:
        yield from ((block.block.prefix + parameter.name, parameter) for parameter in block.parameters)


def _empty(parameter: Parameter, device: torch.device) -> torch.Tensor:
    return torch.empty(parameter.engine_shape, dtype=getattr(torch, parameter.dtype), device=device)
