"""Tensor parallelism for what belongs to heads and is no linear: norms that run over all heads, attention sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from refit.models.fsdp2.experts import LocalParameters
from refit.models.norm_of_parts import norm_of_parts


class NormOfParts(ParallelStyle):
    """Splits the weight of an RMS norm over a mesh; each rank normalises its part by the mean of all."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        _split(module, "weight", device_mesh)
        module.forward = _Forward(module, device_mesh)
        return module


class _Forward:
    def __init__(self, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        self._module, self._group = module, mesh.get_group()

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        """Collective: every rank of the mesh, with its part `[..., width]`."""
        weight = self._module.get_parameter("weight")
        return norm_of_parts(part, weight.to_local() if isinstance(weight, DTensor) else weight, self._group)


class SinksOfParts(ParallelStyle):
    """Splits the sinks of an attention module over a mesh, as its heads are."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        _split(module, "sinks", device_mesh)
        module.forward = _WithLocalParameters(module)
        return module


class _WithLocalParameters:
    """The forward pass of a module whose own parameters are split, with this rank's parts."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return type(self._module).forward(LocalParameters(self._module), *arguments, **options)


def _split(module: torch.nn.Module, name: str, mesh: DeviceMesh) -> None:
    part = distribute_tensor(module.get_parameter(name), mesh, [Shard(0)], src_data_rank=None)
    module.register_parameter(name, torch.nn.Parameter(part))
