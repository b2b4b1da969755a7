"""Expert parallelism for the fused experts of transformers: experts split over a mesh, tokens gathered for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def experts_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules within `module` that hold all routed experts of a layer."""
    return [part for name, part in module.named_modules() if name.endswith("mlp.experts")]


def split_over_experts(modules: Iterable[torch.nn.Module], mesh: DeviceMesh) -> None:
    """Split dim 0 of every parameter, the experts, over `mesh`. Parameters are on the meta device."""
    if mesh.size() == 1:
        return
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, torch.nn.Parameter(split))
        module.forward = _Forward(module, mesh)


class _Forward:
    """The forward pass of a module of experts whose parameters are split over `mesh`."""

    def __init__(self, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        self._module, self._group, self._rank = module, mesh.get_group(), mesh.get_local_rank()

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` `[tokens, hidden]`, `index` and `weights` `[tokens, topk]`: weighted outputs like `hidden`.

        Every rank computes its experts for the tokens of all, and the outputs are summed. Collective: every rank of
        the mesh, with equally many tokens.
        """
        local, group = LocalParameters(self._module), self._group
        all_hidden, all_weights = _gathered(hidden, group), _gathered(weights, group)
        own_index = _gathered(index, group) - self._rank * local.num_experts
        is_own = (own_index >= 0) & (own_index < local.num_experts)
        tokens, choices = torch.where(is_own)
        own_weights = all_weights[tokens, choices]
        if not len(tokens):  # one token with weight 0: FSDP2 sums gradients that every rank has
            tokens, choices = tokens.new_zeros(1), choices.new_zeros(1)
            own_index, own_weights = torch.zeros_like(own_index), 0 * all_weights[0, :1]
        outputs = type(self._module).forward(
            local, all_hidden[tokens], own_index[tokens, choices, None], own_weights[:, None]
        )
        added = torch.zeros_like(all_hidden).index_add(0, tokens, outputs)
        summed: torch.Tensor = _ScatteredSum.apply(added, group)  # type: ignore[no-untyped-call]
        return summed


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    found: torch.Tensor = _Gathered.apply(part, group)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    """Rows of all ranks of a group, in their order. The backward pass is that of `_ScatteredSum`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _gather(rows, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _scatter_sum(gradients[0], ctx.group), None


class _ScatteredSum(torch.autograd.Function):
    """The sum of all ranks' rows, of which each gets its part."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _scatter_sum(rows, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _gather(gradients[0], ctx.group), None


def _gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    found = rows.new_empty(group.size() * rows.size(0), *rows.shape[1:])
    dist.all_gather_into_tensor(found, rows.contiguous(), group=group)
    return found


def _scatter_sum(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    found = rows.new_empty(rows.size(0) // group.size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(found, rows.contiguous(), group=group)
    return found


class LocalParameters:
    """A module as its own `forward` sees it, with this rank's parts of its own parameters as plain tensors; of one of
    experts `num_experts` is how many this rank has."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._local = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in module.named_parameters(recurse=False)
        }
        self.num_experts = next(iter(self._local.values())).size(0)

    def __getattr__(self, name: str) -> Any:
        return self._local[name] if name in self._local else getattr(self._module, name)
